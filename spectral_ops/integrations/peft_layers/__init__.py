"""The layers of PEFT's tuners that ``accelerate`` knows, a module per tuner.

Each has the plan of a call (its tensors, or the reason why it does not fit), the run that hands them to an operator,
and the class that holds both.
"""

from __future__ import annotations

import importlib
import importlib.util

TUNERS = {  # PEFT's package -> our module of its layers
    "peft.tuners.lora": "peft",
    "peft.tuners.lora.layer": "peft_experts",
    "peft.tuners.hira": "peft_layers.hira",
    "peft.tuners.loha": "peft_layers.lycoris",
    "peft.tuners.randlora": "peft_layers.randlora",
    "peft.tuners.vera": "peft_layers.vera",
    "peft.tuners.lora.variants": "peft_layers.conv",
    "peft.tuners.lora.dora": "peft_layers.embedding",
    "peft.tuners.shira": "peft_layers.shira",
    "peft.tuners.supertuning": "peft_layers.supertuning",
}


def enter_all() -> None:
    """Import the module of every tuner that this PEFT has; each enters its classes into the table."""
    for tuner, module in TUNERS.items():
        if importlib.util.find_spec(tuner) is not None:
            importlib.import_module(f"spectral_ops.integrations.{module}")
