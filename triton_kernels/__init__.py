"""Triton implementations, one module per operator stem; installed as ``spectral_ops.triton_kernels``.

Nothing here imports triton until an operator runs. Each module holds its kernels, one table of tile sizes per kernel
(by architecture and element size), and one launcher per operator with the operator's name and its schema's arguments.
Launchers use the current stream of the tensors' device, never wait for it, and reduce in a fixed order: two runs give
the same bits. float64 tensors go to the operator's reference, since tensor cores take float64 on some targets only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

# operator -> the module that holds its launcher, a function of the operator's name and arguments
OPERATORS: dict[str, str] = {
    "block_sum": "blocksum",
    "block_tile_": "blocksum",
    "lowrank_matmul": "lowrank",
    "lowrank_update_": "lowrank",
    "lowrank_backward": "lowrank",
    "column_norm": "dora",
    "column_norm_cached_": "dora",
    "magnitude_grad": "dora",
    "dropout_project": "dropout",
    "dropout_outer": "dropout",
    "dropout_lift_": "dropout",
    "seeded_dropout": "dropout",
    "bat_weight_": "bat",
    "bat_matmul": "bat",
    "bat_contract_": "bat",
    "bat_mix": "bat",
    "bat_mix_backward_": "bat",
    "cayley_forward": "cayley",
    "cayley_backward": "cayley",
    "csr_scatter_": "csr",
    "csr_gather_": "csr",
    "csr_spmm_": "csr",
    "csr_sddmm": "csr",
    "target_logprob": "policy",
    "softmax_gradient_": "policy",
    "segment_project": "segments",
    "segment_lift_": "segments",
    "segment_outer": "segments",
    "importance_update_": "importance",
    "importance_prune_": "importance",
}

# operator -> names of further tiles that its launcher takes as ``tiles=``, beside its table's: the tuner's candidates
TILES: dict[str, tuple[str, ...]] = {
    "block_sum": ("short", "tall"),
    "block_tile_": ("short", "tall"),
    "lowrank_matmul": ("shallow", "deep"),
    "lowrank_update_": ("short", "wide"),
    "lowrank_backward": ("short", "narrow"),
    "column_norm": ("short", "wide"),
    "column_norm_cached_": ("short", "wide"),
    "dropout_project": ("short", "narrow"),
    "dropout_outer": ("short", "narrow"),
    "dropout_lift_": ("short", "narrow"),
    "bat_weight_": ("short", "shallow"),
    "bat_mix": ("shallow",),
    "segment_project": ("short", "narrow"),
    "segment_lift_": ("short",),
    "segment_outer": ("short", "narrow"),
}


def launcher(stem: str, name: str) -> Callable:
    """The launcher of operator ``name`` in ``triton_kernels/<stem>.py``."""
    return getattr(importlib.import_module(f"{__name__}.{stem}"), name)
