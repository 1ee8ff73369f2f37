"""The methods there are: a new one is its file and one entry here."""

from __future__ import annotations

from typing import Any

from torch import nn

from spectral_ops.adapters.adalora import AdaLoRALinear
from spectral_ops.adapters.adalora_dash import AdaLoRADashLinear
from spectral_ops.adapters.base import AdapterLinear, unadapted
from spectral_ops.adapters.bat import BatLinear
from spectral_ops.adapters.bone import BoneLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.dash import LoRADashLinear
from spectral_ops.adapters.dora import DoRALinear
from spectral_ops.adapters.dvora import DVoRALinear
from spectral_ops.adapters.experts import LoRAExperts
from spectral_ops.adapters.frozen import is_linear, linear_size
from spectral_ops.adapters.lora import LoRALinear
from spectral_ops.adapters.pica import PiCaLinear
from spectral_ops.adapters.rosa import RoSALinear
from spectral_ops.adapters.spectral import SpectralLinear
from spectral_ops.adapters.svft import SVFTLinear
from spectral_ops.adapters.vera import VeRALinear

METHODS: tuple[type[AdapterLinear], ...] = (
    LoRALinear,
    DoRALinear,
    BatLinear,
    BoneLinear,
    RoSALinear,
    PiCaLinear,
    SpectralLinear,
    SVFTLinear,
    LoRADashLinear,
    VeRALinear,
    DVoRALinear,
    AdaLoRALinear,
    AdaLoRADashLinear,
)


def layer_type(config: Any) -> type[AdapterLinear]:
    """The layer class of a config."""
    for method in METHODS:
        if type(config) is method.config_type:
            return method
    known = ", ".join(method.config_type.__name__ for method in METHODS)
    raise TypeError(f"config: got {type(config).__name__}, wanted one of {known}")


def layer_class(config: Any, module: nn.Module) -> type[AdapterLinear]:
    """The class that adapts ``module``, which a config chooses: that of its method, or the one for experts."""
    method = layer_type(config)
    return method if is_linear(unadapted(module)) else LoRAExperts


def linear_sizes(chosen: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of those chosen modules, by path, that are linear layers, adapted or not."""
    layers = {path: unadapted(module) for path, module in chosen.items()}
    return {path: linear_size(layer) for path, layer in layers.items() if is_linear(layer)}


def config_type(fields: dict[str, Any]) -> type[AdapterConfig] | None:
    """The config class that an adapter_config.json with these fields belongs to; None where no method claims it."""
    return next((config for config in (method.config_type for method in METHODS) if config.claims(fields)), None)
