"""Fused operators: one file per operator, each with its schema, reference, autograd function and public functions."""

from spectral_ops.core.scratch import scratch
from spectral_ops.functional import routing  # noqa: F401  (its operators)
from spectral_ops.functional.bat import bat_linear, bat_weight
from spectral_ops.functional.blocksum import block_sum, bone_linear, bone_update, disha_linear
from spectral_ops.functional.cayley import cayley
from spectral_ops.functional.conv import conv_update
from spectral_ops.functional.csr import csr_add, csr_sddmm, csr_spmm
from spectral_ops.functional.csr_matrix import CSR
from spectral_ops.functional.dash import task_direction_scores
from spectral_ops.functional.dora import column_norm, dora_linear, dora_update
from spectral_ops.functional.embedding import embedding_update
from spectral_ops.functional.experts import experts_lowrank, experts_mlp
from spectral_ops.functional.float8 import float8_linear
from spectral_ops.functional.group import lowrank_linear_group
from spectral_ops.functional.hadamard import hira_linear, loha_linear, loha_update
from spectral_ops.functional.householder import householder_linear
from spectral_ops.functional.importance import adalora_importance, adalora_prune, orthogonality_loss
from spectral_ops.functional.kron import kron_linear, kron_update
from spectral_ops.functional.lowrank import lowrank_linear, lowrank_update
from spectral_ops.functional.norm_cache import NormCache
from spectral_ops.functional.policy import kl_to_anchor, preference_loss, token_logprobs
from spectral_ops.functional.randlora import randlora_linear, randlora_update
from spectral_ops.functional.rosa import rosa_linear, rosa_update
from spectral_ops.functional.rosa_resident import residents
from spectral_ops.functional.rotation import rotate, rotation_linear
from spectral_ops.functional.segments import segmented_lowrank_linear, segmented_lowrank_update
from spectral_ops.functional.svft import svft_linear
from spectral_ops.functional.vera import vera_linear, vera_update

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
    "conv_update",
    "csr_add",
    "csr_sddmm",
    "csr_spmm",
    "disha_linear",
    "dora_linear",
    "dora_update",
    "embedding_update",
    "experts_lowrank",
    "experts_mlp",
    "float8_linear",
    "hira_linear",
    "householder_linear",
    "kl_to_anchor",
    "kron_linear",
    "kron_update",
    "loha_linear",
    "loha_update",
    "lowrank_linear",
    "lowrank_linear_group",
    "lowrank_update",
    "orthogonality_loss",
    "preference_loss",
    "randlora_linear",
    "randlora_update",
    "residents",
    "rosa_linear",
    "rosa_update",
    "rotate",
    "rotation_linear",
    "scratch",
    "segmented_lowrank_linear",
    "segmented_lowrank_update",
    "svft_linear",
    "task_direction_scores",
    "token_logprobs",
    "vera_linear",
    "vera_update",
]
