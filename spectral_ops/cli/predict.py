"""The adapter tax of whole models on GPUs, on paper: ``bench --predict``.

For the seven projections of one block: every operator of a method's present routes at its own bound under the ceilings
of :mod:`spectral_ops.cli.cost`, one after the other, beside the frozen projections. Attention, norms and the head are
left out of both. The routes and tile sizes counted are the CPU's: on a GPU Bat's tiles are larger and RoSA's dS comes
from another kernel. A measured point that lies elsewhere has a reason to be found.
"""

from __future__ import annotations

import torch

from spectral_ops._table import table
from spectral_ops.bench.shapes import BLOCKS
from spectral_ops.cli.cost import CEILINGS, cost

METHODS = ("lora", "dora", "bone", "bat", "bat_row", "rosa")
TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)


def block_seconds(name: str | None, model: str, tokens: int) -> dict[str, float]:
    """Predicted seconds of forward and backward of one block's projections, by architecture; None: frozen."""
    total = dict.fromkeys(CEILINGS, 0.0)
    for (d, k), count in BLOCKS[model].items():
        c = cost(name, tokens, d, k, torch.bfloat16)
        for architecture, ceiling in CEILINGS.items():
            total[architecture] += count * c.seconds(ceiling)
    return total


def report(models=("llama3-8b", "llama3-70b"), tokens=TOKENS, methods=METHODS) -> str:
    """The table: time over the frozen projections, by model, tokens, method and architecture."""
    rows = []
    for model in models:
        for T in tokens:
            frozen = block_seconds(None, model, T)
            for name in methods:
                seconds = block_seconds(name, model, T)
                rows.append([model, T, name, *(f"{seconds[a] / frozen[a]:.3f}" for a in CEILINGS)])
    return table(["model", "tokens", "method", *CEILINGS], rows)
