"""Which stacked weights of experts a config chooses, by PEFT's rules.

transformers 5 holds the experts of these families in parameters [experts, out, in], where earlier versions had linear
layers. PEFT's LoRA therefore turns their old names, and "all-linear", into ``target_parameters``.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys

from torch import nn

from spectral_ops.adapters.base import AdapterLinear, unadapted
from spectral_ops.adapters.choice.architectures import model_type
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.expert_layer import unfit
from spectral_ops.adapters.experts import named
from spectral_ops.adapters.lora import LoRAConfig
from spectral_ops.adapters.tree import walk

STACKS = {  # the parameter that an old name of a linear layer means now
    "mixtral": {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
}
ROUTER = "gate"  # whose weight [experts, in] PEFT adapts as a parameter too


def _stacks(model: nn.Module, peft_type: str) -> dict[str, str]:
    kind = model_type(model)
    if peft_type != "LORA" or not isinstance(kind, str) or "transformers" not in sys.modules:
        return {}
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5 they are linear layers
        return {}
    families = {**getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return STACKS.get(families.get(kind), {})


def old_names(model: nn.Module, peft_type: str) -> frozenset[str]:
    """The names that mean a stack of experts, or their router, to PEFT in this model, whatever else is called so."""
    names = _stacks(model, peft_type)
    return frozenset({ROUTER, *names} if names else ())


def converted(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with old names in a list of target_modules turned into target_parameters, as PEFT does.

    gate and up, which one parameter holds now, get twice the rank and α between them, and go together: ValueError where
    one is there without the other.
    """
    stacks = _stacks(model, config.peft_type)
    if type(config) is not LoRAConfig or not stacks or isinstance(config.target_modules, str):
        return config
    if config.target_modules is None:  # PEFT looks up no default there
        return dataclasses.replace(config, target_modules=[]) if config.target_parameters else config
    old = {name: name.rpartition(".")[2] for name in config.target_modules if name.rpartition(".")[2] in stacks}
    if not old:
        return config
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for stack in sorted({stacks[name] for name in old.values()}):
        parts = [name for name in stacks if stacks[name] == stack]
        if missing := [name for name in parts if name not in old.values()]:
            config.wrong("target_modules", config.target_modules, f"{missing[0]!r} too, which {stack} holds as well")
        if len(parts) > 1:
            key = rf".*\.{re.escape(stack)}"
            ranks[key], alphas[key] = config.r * len(parts), config.lora_alpha * len(parts)
    parameters = [*(config.target_parameters or []), *(stacks[name] for name in old.values())]
    return dataclasses.replace(
        config, target_modules=[name for name in config.target_modules if name not in old],
        target_parameters=list(dict.fromkeys(parameters)), rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip


def checkpoint_names(model: nn.Module, path: str) -> tuple[str, dict[str, str]]:
    """The path of the experts at ``path`` in a checkpoint that has linear layers for each, and what it calls those."""
    if "w1" in _stacks(model, "LORA"):
        return path.replace(".mlp.", ".block_sparse_moe."), {"gate": "w1", "up": "w3", "down": "w2"}
    return path, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def experts(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The experts modules of which ``config`` names parameters, by their first path.

    Raises ValueError where it names a parameter that is no stack of an experts module we can run.
    """
    targets, found, seen = getattr(config, "target_parameters", None), {}, set()
    for path, module in walk(model) if targets else ():
        base = unadapted(module)
        names = named(targets, path, base) if id(module) not in seen else []
        seen.add(id(module))
        if not names:
            continue
        field = f"target_parameters: got {targets!r}, which matches {f'{path}.{names[0]}'!r}"
        if not path:
            raise ValueError(f"{field}, wanted parameters of a module inside the model")
        if flat := [name for name in names if base._parameters[name].dim() != 3]:
            shape = list(base._parameters[flat[0]].shape)
            raise ValueError(
                f"{field}, wanted stacks [experts, out, in] only ({flat[0]} is {shape}; a linear layer's weight belongs"
                " in target_modules, and nothing here adapts a router)"
            )
        if not isinstance(module, AdapterLinear) and (why := unfit(base, names)) is not None:
            raise ValueError(f"{field}, wanted the experts of a layer that can be run with updates ({why})")
        if config.bias == "all" and getattr(base, "has_bias", False):
            config.wrong("bias", "all", f"'none' over {path!r}, whose experts have biases, which stay frozen")
        found[path] = module
    return found


def stacks(model: nn.Module) -> list[str]:
    """The paths of parameters [experts, out, in] of the model's experts."""
    return [
        name for name, p in model.named_parameters() if p.dim() == 3 and name.endswith(("gate_up_proj", "down_proj"))
    ]
