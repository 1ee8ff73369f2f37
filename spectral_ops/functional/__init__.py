"""Fused operators: one file per operator, each with its schema, reference, autograd function and public functions."""

from spectral_ops._library import FUNCTIONS
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

_DROPOUT = ("dropout_project", "dropout_outer", "dropout_lift_")
_SHARDS = ("block_sum", "block_tile_")
_NORM = ("row_square", "column_norm", "column_norm_cached_")
FUNCTIONS.update(
    bone_linear=_SHARDS,
    bone_update=_SHARDS,
    disha_linear=_SHARDS,
    dora_linear=(*_NORM, "lowrank_update_", "lowrank_backward", "magnitude_grad", "seeded_dropout", "dropout_outer"),
    dora_update=("lowrank_update_", "lowrank_backward"),
    lowrank_linear=("lowrank_update_", "lowrank_backward", *_DROPOUT),
    lowrank_linear_group=("lowrank_backward",),
    lowrank_update=("lowrank_update_", "lowrank_backward", *_DROPOUT),
)
