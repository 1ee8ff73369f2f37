"""What a layer of each method costs on paper: arithmetic, bytes and saved bytes beside the frozen layer.

Counted from the operators' registered formulas and torch's, on shapes alone: no weight exists and nothing runs. The
routes are the CPU's, without the copies that only it makes. The last columns predict the time beside the frozen
layer's, every operator of the present routes at its own bound under ceilings that are assumed, one after the other,
nothing overlapped.
"""

from __future__ import annotations

import argparse

import torch

from spectral_ops._table import table
from spectral_ops.bench import methods
from spectral_ops.bench.counting import CEILINGS, Cost, cost
from spectral_ops.bench.methods import BLOCKS, DTYPES

DEFAULTS = {"tokens": 8192, "d": 4096, "k": 4096}
PREDICTED = ("lora", "dora", "bone", "bat", "bat_row", "rosa")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


def cells(c: Cost, frozen: Cost, ceiling) -> list[str]:
    return [
        f"{c.trained:,}",
        f"{c.forward.flops / frozen.forward.flops - 1:+.1%}",
        f"{c.backward.flops / frozen.backward.flops - 1:+.1%}",
        f"{(c.bytes - frozen.bytes) / 2**20:+.0f}",
        f"{c.saved_bytes / 2**20:.2f}",
        f"{c.seconds(ceiling) / frozen.seconds(ceiling):.3f}",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    parser.add_argument("--tokens", type=int, default=DEFAULTS["tokens"])
    parser.add_argument("--shape", type=int, nargs=2, default=[DEFAULTS["d"], DEFAULTS["k"]], metavar=("OUT", "IN"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rank", type=int, help="of every method; default: its usual one")
    parser.add_argument("--operators", action="store_true", help="also what each operator of a method takes part with")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    d, k = arguments.shape
    dtype = DTYPES[arguments.dtype]
    fields = {"r": arguments.rank} if arguments.rank else {}
    frozen = cost(None, arguments.tokens, d, k, dtype)
    header = ["method", "trained", "fwd FLOPs", "bwd FLOPs", "MiB moved", "MiB saved", "sm_80", "sm_90", "sm_100"]
    rows = []
    for name in arguments.methods:
        c = cost(name, arguments.tokens, d, k, dtype, **fields)
        floors = [f"{c.seconds(ceiling) / frozen.seconds(ceiling):.3f}" for ceiling in CEILINGS.values()]
        rows.append([name, *cells(c, frozen, CEILINGS["sm_90"])[:-1], *floors])
        if arguments.operators:
            for direction, counts in (("forward", c.forward), ("backward", c.backward)):
                for operator, call in counts.items():
                    label = f"  {direction} {operator} x{len(call)}"
                    rows.append([label, "", f"{call.flops / 1e9:.2f} G", "", f"{call.bytes / 2**20:.1f}", *[""] * 4])
    print(
        f"T={arguments.tokens}, layer {d}x{k}, {arguments.dtype}; beside the frozen layer's"
        f" {frozen.flops / 1e9:.0f} GFLOP and {frozen.bytes / 2**20:.0f} MiB."
        " sm_*: predicted time, x frozen, under assumed ceilings.\n"
    )
    print(table(header, rows))
    return 0


def block_seconds(name: str | None, model: str, tokens: int) -> dict[str, float]:
    """Predicted seconds of forward and backward of one block's projections, by architecture; None: frozen."""
    total = dict.fromkeys(CEILINGS, 0.0)
    for (d, k), count in BLOCKS[model].items():
        c = cost(name, tokens, d, k, torch.bfloat16)
        for architecture, ceiling in CEILINGS.items():
            total[architecture] += count * c.seconds(ceiling)
    return total


def predictions(models=("llama3-8b", "llama3-70b"), tokens=LENGTHS, methods=PREDICTED) -> str:
    """The adapter tax of whole models on GPUs, on paper: a table of time over the frozen projections.

    For the seven projections of one block: every operator of a method's present routes at its own bound, one after the
    other. Attention, norms and the head are left out of both. The routes and tile sizes counted are the CPU's: on a GPU
    Bat's tiles are larger and RoSA's dS comes from another kernel. A measured point that lies elsewhere has a reason to
    be found.
    """
    rows = []
    for model in models:
        for T in tokens:
            frozen = block_seconds(None, model, T)
            for name in methods:
                seconds = block_seconds(name, model, T)
                rows.append([model, T, name, *(f"{seconds[a] / frozen[a]:.3f}" for a in CEILINGS)])
    return table(["model", "tokens", "method", *CEILINGS], rows)
