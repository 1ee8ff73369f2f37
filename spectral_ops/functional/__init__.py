"""Fused operators: one file per operator, each with its schema, reference, autograd function and public functions."""

from spectral_ops._library import FUNCTIONS
from spectral_ops.functional.bat import bat_linear, bat_weight
from spectral_ops.functional.blocksum import block_sum, bone_linear, bone_update, disha_linear
from spectral_ops.functional.cayley import cayley
from spectral_ops.functional.csr import CSR, csr_add, csr_sddmm, csr_spmm, rosa_linear, rosa_update
from spectral_ops.functional.dash import task_direction_scores
from spectral_ops.functional.dora import column_norm, dora_linear, dora_update
from spectral_ops.functional.importance import adalora_importance, adalora_prune, orthogonality_loss
from spectral_ops.functional.lowrank import lowrank_linear, lowrank_linear_group, lowrank_update
from spectral_ops.functional.norm_cache import NormCache
from spectral_ops.functional.policy import kl_to_anchor, preference_loss, token_logprobs
from spectral_ops.functional.resident import residents
from spectral_ops.functional.scratch import scratch
from spectral_ops.functional.segments import segmented_lowrank_linear, segmented_lowrank_update

__all__ = [
    "CSR",
    "NormCache",
    "adalora_importance",
    "adalora_prune",
    "bat_linear",
    "bat_weight",
    "block_sum",
    "bone_linear",
    "bone_update",
    "cayley",
    "column_norm",
    "csr_add",
    "csr_sddmm",
    "csr_spmm",
    "disha_linear",
    "dora_linear",
    "dora_update",
    "kl_to_anchor",
    "lowrank_linear",
    "lowrank_linear_group",
    "lowrank_update",
    "orthogonality_loss",
    "preference_loss",
    "residents",
    "rosa_linear",
    "rosa_update",
    "scratch",
    "segmented_lowrank_linear",
    "segmented_lowrank_update",
    "task_direction_scores",
    "token_logprobs",
]

_DROPOUT = ("dropout_project", "dropout_outer", "dropout_lift_")
_SHARDS = ("block_sum", "block_tile_")
_NORM = ("row_square", "column_norm", "column_norm_cached_")
_BAT = ("bat_weight_", "bat_matmul", "bat_contract_", "bat_mix", "bat_mix_backward_")
_CSR_GRADIENT = ("csr_sddmm", "csr_gather_", "transpose_")
_SEGMENTS = ("segment_project", "segment_lift_", "segment_outer")
FUNCTIONS.update(
    adalora_importance=("importance_update_",),
    adalora_prune=("importance_prune_",),
    cayley=("cayley_forward", "cayley_backward"),
    csr_add=("csr_scatter_", "csr_gather_"),
    csr_sddmm=("csr_sddmm", "csr_spmm_"),
    csr_spmm=("csr_spmm_", *_CSR_GRADIENT),
    rosa_linear=("csr_spmm_", "csr_scatter_", *_CSR_GRADIENT, "lowrank_backward", *_DROPOUT),
    rosa_update=("csr_spmm_", *_CSR_GRADIENT),
    bat_linear=(*_BAT, *_SHARDS, "transpose_"),
    bat_weight=("bat_weight_", "bat_contract_"),
    bone_linear=_SHARDS,
    bone_update=_SHARDS,
    disha_linear=_SHARDS,
    dora_linear=(*_NORM, "lowrank_update_", "lowrank_backward", "magnitude_grad", "seeded_dropout", "dropout_outer"),
    dora_update=("lowrank_update_", "lowrank_backward"),
    lowrank_linear=("lowrank_matmul", "lowrank_update_", "lowrank_backward", *_DROPOUT),
    lowrank_linear_group=("lowrank_backward",),
    lowrank_update=("lowrank_update_", "lowrank_backward", *_DROPOUT),
    segmented_lowrank_linear=("lowrank_backward", *_SEGMENTS, *_DROPOUT),
    segmented_lowrank_update=("lowrank_backward", *_SEGMENTS, *_DROPOUT),
    token_logprobs=("target_logprob", "softmax_gradient_"),
)
