"""Adapters: thin modules that hold parameters and call one operator; one file per method."""

from spectral_ops.adapters.adalora import AdaLoRAConfig, AdaLoRALinear
from spectral_ops.adapters.adalora_dash import AdaLoRADashConfig, AdaLoRADashLinear
from spectral_ops.adapters.adalora_schedule import AdaLoRASchedule
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.bat import BatConfig, BatLinear
from spectral_ops.adapters.bone import BoneConfig, BoneLinear
from spectral_ops.adapters.config import AdapterConfig, TokensConfig
from spectral_ops.adapters.dash import LoRADashConfig, LoRADashLinear
from spectral_ops.adapters.dora import DoRAConfig, DoRALinear
from spectral_ops.adapters.dvora import DVoRAConfig, DVoRALinear
from spectral_ops.adapters.experts import LoRAExperts
from spectral_ops.adapters.export import export_adapter
from spectral_ops.adapters.io import load_adapter, save_adapter
from spectral_ops.adapters.lora import LoRAConfig, LoRALinear
from spectral_ops.adapters.lora_plus import lora_plus_groups
from spectral_ops.adapters.model import attach, detach, disabled, merge, quantize_base, set_adapter, unmerge
from spectral_ops.adapters.pica import PiCaConfig, PiCaLinear
from spectral_ops.adapters.pretrained import print_trainable_parameters
from spectral_ops.adapters.rosa import RoSAConfig, RoSALinear
from spectral_ops.adapters.rosa_schedule import MasksSaved, RoSASchedule
from spectral_ops.adapters.segments import segments, train_adapters
from spectral_ops.adapters.spectral import SpectralConfig, SpectralLinear
from spectral_ops.adapters.spectral_fusion import fuse_spectral
from spectral_ops.adapters.svft import SVFTConfig, SVFTLinear
from spectral_ops.adapters.tree import adapter_configs, adapter_layers
from spectral_ops.adapters.vera import VeRAConfig, VeRALinear

__all__ = [
    "AdaLoRAConfig",
    "AdaLoRADashConfig",
    "AdaLoRADashLinear",
    "AdaLoRALinear",
    "AdaLoRASchedule",
    "AdapterConfig",
    "AdapterLinear",
    "BatConfig",
    "BatLinear",
    "BoneConfig",
    "BoneLinear",
    "DVoRAConfig",
    "DVoRALinear",
    "DoRAConfig",
    "DoRALinear",
    "LoRAConfig",
    "LoRADashConfig",
    "LoRADashLinear",
    "LoRAExperts",
    "LoRALinear",
    "MasksSaved",
    "PiCaConfig",
    "PiCaLinear",
    "RoSAConfig",
    "RoSALinear",
    "RoSASchedule",
    "SVFTConfig",
    "SVFTLinear",
    "SpectralConfig",
    "SpectralLinear",
    "TokensConfig",
    "VeRAConfig",
    "VeRALinear",
    "adapter_configs",
    "adapter_layers",
    "attach",
    "detach",
    "disabled",
    "export_adapter",
    "fuse_spectral",
    "load_adapter",
    "lora_plus_groups",
    "merge",
    "print_trainable_parameters",
    "quantize_base",
    "save_adapter",
    "segments",
    "set_adapter",
    "train_adapters",
    "unmerge",
]
