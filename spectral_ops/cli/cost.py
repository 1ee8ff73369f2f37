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
from spectral_ops.functional import lowrank_routes
from spectral_ops.functional.lowrank_routes import MatmulSizes, matmul_costs

DEFAULTS = {"tokens": 8192, "d": 4096, "k": 4096}
PREDICTED = ("lora", "dora", "bone", "bat", "bat_row", "rosa")
JOINED = ("lora", "pissa", "adalora", "spectral", "dora", "bone")  # methods whose update a product can take in
SHARES = (1.0, 0.97, 0.94, 0.9)  # of the library's rate, the fused route's
UPDATES = ("addmm_", "lowrank_update_", "block_tile_")  # what adds a method's update to y or dx
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


# --- with the update in the product ----------------------------------------------------------------------------------


def products(counts, T: int, wide: int, inner: int) -> tuple[MatmulSizes, float]:
    """Of one direction of a layer: its product with its update, as the routes' sizes; every other call's roofline."""
    update, rest = None, 0.0
    flops_rate, bytes_rate = CEILINGS["sm_90"]
    for name, call in counts.items():
        for flops, moved in call:
            if name in UPDATES:
                assert update is None, f"{name}: a second update in one direction"
                update = name, flops // (2 * T * wide)
            elif not (name == "mm" and flops == 2 * T * wide * inner):
                rest += max(flops / flops_rate, moved / bytes_rate)
    name, r = update or ("", 0)
    sizes = MatmulSizes(T, wide, inner, r, fused_runs=False)
    if name == "block_tile_":
        sizes = sizes._replace(r=0, tiled=True)
    elif name == "lowrank_update_":
        sizes = sizes._replace(r=r - 1, scaled=True)  # it counts g with the rank
    return sizes, rest


def shared_bytes(name: str, model: str, T: int) -> int:
    """Bytes of x that a block reads less where q, k, v and gate, up form h, and dA, together: (2 + 1) T k elements in a
    direction. Bone's h is as common, and its backward reads no x."""
    k = next(iter(BLOCKS[model]))[1]
    return (1 if name == "bone" else 2) * (2 + 1) * T * k * lowrank_routes.ELEMENT


def joined_block(name: str, model: str, T: int) -> dict[str, float]:
    """The block's tax on sm_90 by what its products may take: "library" alone, "update first" too, or the fused route
    at a share of the library's rate too; and the latter with siblings that share h."""
    frozen, total = 0.0, dict.fromkeys(["library", "update first", *SHARES], 0.0)
    for (d, k), count in BLOCKS[model].items():
        c = cost(name, T, d, k, torch.bfloat16)
        for counts, wide, inner in ((c.forward, d, k), (c.backward, k, d)):
            sizes, rest = products(counts, T, wide, inner)
            frozen += count * matmul_costs(sizes._replace(r=0, scaled=False, tiled=False)).library
            for routes in total:
                if isinstance(routes, float):
                    costs = matmul_costs(sizes._replace(fused_runs=True), routes)
                else:
                    costs = matmul_costs(sizes)
                route = "library" if routes == "library" else costs.best()
                total[routes] += count * (rest + getattr(costs, route))
    taxes = {str(routes): seconds / frozen for routes, seconds in total.items()}
    saved = shared_bytes(name, model, T) / lowrank_routes.MEMORY_RATE
    return taxes | {"siblings": (total[lowrank_routes.FUSED_SHARE] - saved) / frozen}


def joined(model: str = "llama3-8b", T: int = 8192, methods=JOINED) -> tuple[list[str], list[list[str]]]:
    """The block's tax on sm_90 by the routes its products may take: headings and rows.

    The products by the routes' costs (waves and launches; in the frozen block too), every other call at its roofline as
    in :func:`predictions`, whose figure is the first.
    """
    share = f"{100 * lowrank_routes.FUSED_SHARE:.0f} %"
    header = ["method", "at rooflines", "library", "update first", *(f"fused at {100 * s:.0f} %" for s in SHARES),
              f"{share}, siblings share h", "MiB of x saved"]  # fmt: skip
    floor = block_seconds(None, model, T)["sm_90"]
    rows = []
    for name in methods:
        roofline = block_seconds(name, model, T)["sm_90"] / floor
        cells = (f"{tax:.3f}" for tax in (roofline, *joined_block(name, model, T).values()))
        rows.append([name, *cells, f"{shared_bytes(name, model, T) / 2**20:.0f}"])
    return header, rows
