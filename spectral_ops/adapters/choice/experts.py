"""Mixtures of experts whose stacked weights PEFT adapts under the names that their layers once had.

transformers 5 holds the experts of these families in parameters [experts, out, in], where earlier versions had linear
layers. PEFT's LoRA therefore turns their old names, and "all-linear", into ``target_parameters``.
"""

from __future__ import annotations

import importlib
import sys

from torch import nn

from spectral_ops.adapters.choice.architectures import model_type

OLD_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def old_names(model: nn.Module, peft_type: str) -> frozenset[str]:
    """The names that mean a stack of experts to PEFT in this model, whatever else is called so there."""
    kind = model_type(model)
    if peft_type != "LORA" or not isinstance(kind, str) or "transformers" not in sys.modules:
        return frozenset()
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5 they are linear layers
        return frozenset()
    families = {**getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return OLD_NAMES.get(families.get(kind), frozenset())


def stacks(model: nn.Module) -> list[str]:
    """The paths of parameters [experts, out, in] of the model's experts."""
    return [
        name for name, p in model.named_parameters() if p.dim() == 3 and name.endswith(("gate_up_proj", "down_proj"))
    ]
