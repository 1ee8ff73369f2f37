"""Fused operators: one file per operator, each with its schema, reference, autograd function and public functions."""

from spectral_ops.functional.blocksum import block_sum, bone_linear, bone_update, disha_linear
from spectral_ops.functional.dora import column_norm, dora_linear, dora_update
from spectral_ops.functional.lowrank import lowrank_linear, lowrank_linear_group, lowrank_update
from spectral_ops.functional.norm_cache import NormCache

__all__ = [
    "NormCache",
    "block_sum",
    "bone_linear",
    "bone_update",
    "column_norm",
    "disha_linear",
    "dora_linear",
    "dora_update",
    "lowrank_linear",
    "lowrank_linear_group",
    "lowrank_update",
]
