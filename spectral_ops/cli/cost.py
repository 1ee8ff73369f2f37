"""What a layer of each method costs on paper: arithmetic, bytes and saved bytes beside the frozen layer.

Counted from the operators' registered formulas and torch's, on shapes alone: no weight exists and nothing runs. The
routes are the CPU's, without the copies that only it makes. The last columns predict the time beside the frozen
layer's, every operator of the present routes at its own bound under ceilings that are assumed, one after the other,
nothing overlapped. ``--write-docs`` renews the tables in docs/methods.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from spectral_ops._table import table
from spectral_ops.bench import methods
from spectral_ops.bench.counting import Counts, counted, saved_bytes
from spectral_ops.bench.shapes import DTYPES

# dense bf16 FLOP/s and bytes/s that large products and copies reach, below the data sheet's peaks; none was measured
CEILINGS = {"sm_80": (2.6e14, 1.7e12), "sm_90": (7.9e14, 3.0e12), "sm_100": (1.6e15, 7.0e12)}
DOCS = {"tokens": 8192, "d": 4096, "k": 4096}  # the shape of the tables in docs/methods


@dataclass
class Cost:
    """One layer, forward and backward."""

    trained: int
    forward: Counts
    backward: Counts
    saved_bytes: int  # beside x and parameters

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.backward.bytes

    def seconds(self, ceiling: tuple[float, float]) -> float:
        return self.forward.seconds(*ceiling) + self.backward.seconds(*ceiling)


def cost(name: str | None, tokens: int, d: int, k: int, dtype: torch.dtype, **fields) -> Cost:
    """The cost of method ``name`` (None: the frozen layer) over a bias-free layer [d, k]; ``fields`` of its config."""
    pattern = methods.even_pattern(d, k) if name == "rosa" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        linear = nn.Linear(k, d, bias=False, dtype=dtype).requires_grad_(False)
        x = torch.empty(tokens, k, dtype=dtype, requires_grad=True)
        forward, parameters = (lambda x: F.linear(x, linear.weight)), []
        if name is not None:
            forward, parameters = methods.layer(name, linear, pattern, **fields)
        constants = [linear.weight, *parameters]
        if isinstance(forward, nn.Module):
            constants += [*forward.parameters(), *forward.buffers()]
        saved = saved_bytes(forward, x, constants)
        with counted() as ahead:
            y = forward(x)
        dy = torch.empty_like(y)
        with counted() as back:
            y.backward(dy)
    return Cost(sum(p.numel() for p in parameters), ahead, back, saved)


def _row(c: Cost, frozen: Cost, ceiling) -> list[str]:
    return [
        f"{c.trained:,}",
        f"{c.forward.flops / frozen.forward.flops - 1:+.1%}",
        f"{c.backward.flops / frozen.backward.flops - 1:+.1%}",
        f"{(c.bytes - frozen.bytes) / 2**20:+.0f}",
        f"{c.saved_bytes / 2**20:.2f}",
        f"{c.seconds(ceiling) / frozen.seconds(ceiling):.3f}",
    ]


def docs_table(name: str) -> str:
    """The Markdown table that stands below ``<!-- cost: name -->``."""
    c, frozen = (cost(n, DOCS["tokens"], DOCS["d"], DOCS["k"], torch.bfloat16) for n in (name, None))
    cells = _row(c, frozen, CEILINGS["sm_90"])
    heads = [
        "trained",
        "forward FLOPs",
        "backward FLOPs",
        "MiB moved",
        "MiB saved for backward",
        "predicted, x frozen (H100)",
    ]
    lines = [heads, ["---"] * len(heads), cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_docs(directory: Path, write: bool = True) -> list[str]:
    """Renew the table below every marker in the pages of ``directory``; returns the names of pages that changed."""
    changed = []
    for page in sorted(directory.glob("*.md")):
        text = page.read_text()
        new = re.sub(
            r"^<!-- cost: (\w+) -->\n(?:\n?(?:\|.*\n)+)?",
            lambda match: f"<!-- cost: {match[1]} -->\n\n{docs_table(match[1])}\n",
            text,
            flags=re.M,
        )
        if new != text:
            changed.append(page.name)
            if write:
                page.write_text(new)
    return changed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS))
    parser.add_argument("--tokens", type=int, default=DOCS["tokens"])
    parser.add_argument("--shape", type=int, nargs=2, default=[DOCS["d"], DOCS["k"]], metavar=("OUT", "IN"))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rank", type=int, help="of every method; default: its usual one")
    parser.add_argument("--operators", action="store_true", help="also what each operator of a method takes part with")
    parser.add_argument("--write-docs", type=Path, metavar="DIR", help="renew the tables in the pages of DIR instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or renew the pages."""
    if arguments.write_docs:
        print("\n".join(write_docs(arguments.write_docs)) or "nothing changed")
        return 0
    d, k = arguments.shape
    dtype = DTYPES[arguments.dtype]
    fields = {"r": arguments.rank} if arguments.rank else {}
    frozen = cost(None, arguments.tokens, d, k, dtype)
    header = ["method", "trained", "fwd FLOPs", "bwd FLOPs", "MiB moved", "MiB saved", "sm_80", "sm_90", "sm_100"]
    rows = []
    for name in arguments.methods:
        c = cost(name, arguments.tokens, d, k, dtype, **fields)
        floors = [f"{c.seconds(ceiling) / frozen.seconds(ceiling):.3f}" for ceiling in CEILINGS.values()]
        rows.append([name, *_row(c, frozen, CEILINGS["sm_90"])[:-1], *floors])
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
