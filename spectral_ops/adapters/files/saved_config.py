"""adapter_config.json: what its fields mean here, whatever version of PEFT wrote it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.methods import METHODS, config_type

CONFIG = "adapter_config.json"


def read_config(directory) -> AdapterConfig:
    """The config in ``directory``/adapter_config.json; ValueError where it is damaged or asks for what we lack.

    A field that neither this package nor PEFT's versions known to it have is left out with a warning.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"directory: got {str(directory)!r}, wanted one that holds {CONFIG}")
    try:
        fields: Any = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got invalid JSON ({error}), wanted an adapter's configuration") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got a JSON {type(fields).__name__}, wanted an object")
    fields = modern_fields(fields)
    config = config_type(fields)
    if config is None:
        known = sorted({method.config_type.peft_type for method in METHODS})
        raise ValueError(f"{path}: peft_type: got {fields.get('peft_type')!r}, wanted one of {known}")
    for name, what in config.peft_refused.items():
        if fields.get(name):
            raise ValueError(
                f"{path}: got {name}={fields[name]!r}, which {what}, wanted it off: this package does not have that"
            )
    known_here = config.known_fields() | set(config.peft_refused)
    unknown = {name: value for name, value in fields.items() if name not in known_here and value}
    if unknown:
        warnings.warn(
            f"{path}: left out {unknown}, which no {config.__name__} has; a later version of PEFT or of this package"
            " may have written the file",
            stacklevel=3,
        )
    try:
        return config.from_peft(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def refuse_older_packing(directory) -> None:
    """Raise ValueError where PEFT wrote stacks of experts before it packed them as it does today (0.19.1): a file that
    may have the right shapes and other numbers."""
    fields = json.loads((Path(directory) / CONFIG).read_text())
    if not fields.get("target_parameters") or "loftq_config" not in fields:  # a field that ours lack and PEFT's have
        return
    version = str(fields.get("peft_version") or "0.17")  # the first to have them, which did not write that yet
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < (0, 19, 1):
        raise ValueError(
            f"{directory}: got target_parameters as PEFT {version} packs them, wanted a file of 0.19.1 or later (the"
            " version that wrote it can merge it into the base)"
        )


def modern_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as PEFT writes them today: its Bone, until version 0.18, is MiSS under another name."""
    if fields.get("peft_type") != "BONE":
        return fields
    bias = fields.get("bias", "none")
    return {**fields, "peft_type": "MISS", "bias": "MiSS_only" if bias == "Bone_only" else bias}


def modern_key(key: str) -> str:
    """The key of a tensor as PEFT writes it today."""
    if "lora_magnitude_vector" in key:
        return key.removesuffix(".weight")
    return f"{key.removesuffix('.bone_block')}.miss_block" if key.endswith(".bone_block") else key
