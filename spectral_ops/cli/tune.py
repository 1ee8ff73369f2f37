"""Measure this device: the rates that RoSA's cost model predicts with, then the candidates of every operator.

Prints each measurement, for the rates prediction beside measurement, and what it would store: the rates in
``functional/rates.json``, the choices in ``tuned/<architecture>.json``. ``--write`` stores it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from spectral_ops import _files, _library, backends, tuning
from spectral_ops._table import table
from spectral_ops.bench import candidates
from spectral_ops.bench.clock import timer
from spectral_ops.bench.methods import DTYPES
from spectral_ops.functional import rosa_routes
from spectral_ops.functional.csr import csr_gather_op, csr_scatter_op, csr_sddmm_op, csr_spmm_op, values_gradient
from spectral_ops.functional.csr_matrix import CSR

DENSITIES = (0.001, 0.006, 0.02, 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--parts", nargs="+", choices=("rates", "operators"), default=["rates", "operators"])
    parser.add_argument("--operators", nargs="+", choices=sorted(_library.OPERATORS), help="only these")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 128 1024, and 8192 on a GPU; rates: the last")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("OUT", "IN"),
                        help="may be repeated; rates: the first (default: 2048 2048, on a GPU 4096 4096)")  # fmt: skip
    parser.add_argument("--rank", type=int, nargs="+", help="default: 16, and 64 on a GPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure no further operator after these")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--write", action="store_true", help="store what was measured in the package")


class Problem:
    """One size and dtype: x [T, k], dy [T, d], W [d, k] and masks of several densities."""

    def __init__(self, T: int, d: int, k: int, dtype: torch.dtype, device: str, repeats: int):
        self.T, self.d, self.k, self.repeats = T, d, k, repeats
        g = torch.Generator().manual_seed(0)
        self.x, self.dy, self.W = (torch.randn(s, generator=g).to(device, dtype) for s in ((T, k), (T, d), (d, k)))
        uniform = torch.rand(d, k, generator=g).to(device)
        self.masks = {p: CSR.from_dense(uniform < p) for p in DENSITIES}
        self.clock = timer(torch.device(device))

    def seconds(self, call: Callable[[], object]) -> float:
        """Median of a call, after two to warm up."""
        times = [self.clock(call) for _ in range(self.repeats + 2)]
        return statistics.median(times[2:])

    def rates(self) -> rosa_routes.Rates:
        T, d, k = self.T, self.d, self.k
        few, many = self.masks[DENSITIES[0]], self.masks[DENSITIES[2]]
        low, high = self.sparse(few), self.sparse(many)
        sparse = 2 * T * (many.nnz - few.nnz) / max(high - low, 1e-9)
        slab = T * (d + k) / max(low - 2 * T * few.nnz / sparse, 1e-9)
        pattern, copy = many.pattern, self.W.clone()
        taken = copy.new_empty(many.nnz)
        gather = self.seconds(lambda: csr_gather_op(taken, copy, pattern.row_offsets, pattern.columns))
        scatter = self.seconds(lambda: csr_scatter_op(copy, taken, pattern.row_offsets, pattern.columns, False))
        chosen = torch.arange(0, k, 2, device=self.x.device)
        return rosa_routes.Rates(
            product=2 * T * d * k / self.seconds(lambda: F.linear(self.x, self.W)),
            sparse=sparse,
            slab=slab,
            copy=d * k / self.seconds(lambda: copy.copy_(self.W)),
            gather=2 * many.nnz / (gather + scatter),
            select=T * len(chosen) / self.seconds(lambda: self.x.index_select(1, chosen)),
            launch=self.seconds(lambda: torch.add(self.x[:1, :1], 1.0)),
        )

    def sparse(self, csr: CSR) -> float:
        """Seconds of spmm and of the sampled product, their mean: the model gives both one rate."""
        p, out = csr.pattern, torch.zeros_like(self.dy)
        spmm = self.seconds(lambda: csr_spmm_op(out, self.x, csr.values, p.row_offsets, p.columns, None))
        return (spmm + self.seconds(lambda: csr_sddmm_op(self.dy, self.x, p.row_offsets, p.columns))) / 2

    def measured(self, csr: CSR) -> dict[str, float]:
        """Seconds of each gradient route, and of what "spmm" and "scatter" add to a forward and its dx."""
        p, out = csr.pattern, torch.zeros_like(self.dy)
        found = {
            route: self.seconds(lambda route=route: values_gradient(self.dy, self.x, p, route))
            for route in rosa_routes.GRADIENT_ROUTES
        }
        dx = torch.zeros_like(self.x)
        forward = self.seconds(lambda: csr_spmm_op(out, self.x, csr.values, p.row_offsets, p.columns, None))
        found["spmm"] = forward + self.seconds(
            lambda: csr_spmm_op(dx, self.dy, csr.values, p.column_offsets, p.rows, p.permutation)
        )
        total = torch.empty_like(self.W)

        def scatter() -> None:
            total.copy_(self.W)
            csr_scatter_op(total, csr.values, p.row_offsets, p.columns, True)

        found["scatter"] = 2 * self.seconds(scatter)
        return found


def compare(problem: Problem, rates: rosa_routes.Rates) -> list[list[str]]:
    """A line per density and route: predicted and measured milliseconds, and which of its kind was fastest."""
    lines = []
    for density, csr in problem.masks.items():
        sizes = (problem.T, problem.d, problem.k, csr.nnz)
        active = (csr.pattern.active_rows.numel(), csr.pattern.active_columns.numel())
        predicted = rosa_routes.gradient_costs(*sizes, *active, rates) | rosa_routes.forward_costs(*sizes, rates)
        measured = problem.measured(csr)
        for kind in (rosa_routes.GRADIENT_ROUTES, ("spmm", "scatter")):
            chosen, best = min(kind, key=predicted.get), min(kind, key=measured.get)
            for route in kind:
                note = ("chosen " if route == chosen else "") + ("fastest" if route == best else "")
                times = [f"{1e3 * seconds[route]:.2f}" for seconds in (predicted, measured)]
                lines.append([f"{density:.1%}", route, *times, note.strip()])
    return lines


def rates(arguments: argparse.Namespace, device: torch.device) -> None:
    """Print the rates and the comparison per dtype; with ``--write``, keep the rates."""
    found = {}
    for dtype in arguments.dtype:
        problem = Problem(arguments.tokens[-1], *arguments.shape[0], DTYPES[dtype], str(device), arguments.repeats)
        measured = problem.rates()
        found[dtype] = {name: float(f"{value:.2g}") for name, value in measured._asdict().items()}
        print(f"{device} {dtype}: " + ", ".join(f"{name} {value:.2g}" for name, value in found[dtype].items()))
        print(table(["density", "route", "predicted ms", "measured ms", ""], compare(problem, measured)) + "\n")
    if arguments.write:
        path = Path(rosa_routes.__file__).parent / "rates.json"
        kept = json.loads(path.read_text())
        entry = kept.get(device.type, {"rates": {}})
        kept[device.type] = {"source": candidates.source(device), "rates": entry["rates"] | found}
        path.write_text(json.dumps(kept, indent=2) + "\n")
        print(f"written to {path}")


def operators(arguments: argparse.Namespace, device: torch.device, path: Path | None, deadline: float) -> int:
    """Print what won where and the entries to keep; with ``--write``, put them into the table of this architecture."""
    old = tuning.read(path) if path else {}  # an error here comes before the measuring
    sizes = [(T, d, k, r) for r in arguments.rank for T in arguments.tokens for d, k in arguments.shape]
    names, repeats = arguments.operators, arguments.repeats
    found, red = candidates.search(names, arguments.dtype, sizes, device, repeats, deadline)
    new = candidates.entries(found, device)
    print(tuning.text(new) if new else "nothing beat the default")
    if arguments.write and path and found:
        kept = candidates.merged(old, found, new)
        if kept or path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _files.write(path, lambda part: part.write_text(tuning.text(kept)))
            backends.forget_tables()
            print(f"written to {path}")
    return 1 if red else 0


def run(arguments: argparse.Namespace) -> int:
    """Measure both parts; exit status 1 where a candidate is red."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    arguments.tokens = arguments.tokens or [1, 128, 1024] + [8192] * cuda
    arguments.shape = arguments.shape or [[4096, 4096] if cuda else [2048, 2048]]
    arguments.rank = arguments.rank or [16] + [64] * cuda
    deadline = time.monotonic() + arguments.seconds
    path = tuning.file(device)
    if arguments.write and "operators" in arguments.parts and path is None:
        raise SystemExit(
            f"tune: --write: {device} has no table here: no compiled kernels, or SPECTRAL_OPS_TUNED is empty"
        )
    if "rates" in arguments.parts:
        rates(arguments, device)
    return operators(arguments, device, path, deadline) if "operators" in arguments.parts else 0
