"""The sizes that benchmarks and predictions run at."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# [out, in] of a block's seven projections, and how many have that size
BLOCKS: dict[str, dict[tuple[int, int], int]] = {
    "smollm2": {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1},
    "llama3-8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
    "llama3-70b": {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1},
}


def sizes(names: list[str], custom: tuple[int, int]) -> list[tuple[int, int]]:
    """The distinct [out, in] of the named blocks, in order; the name "custom" stands for ``custom``."""
    found = [size for name in names for size in ([custom] if name == "custom" else BLOCKS[name])]
    return list(dict.fromkeys(found))
