"""Numerical self-test of every operator on every device, dtype and backend present, against float64."""

from __future__ import annotations

import argparse

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from spectral_ops import _library, backends
from spectral_ops._table import table
from spectral_ops.bench.samples import arguments
from spectral_ops.cli.info import devices

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# relative error ‖out - ref‖ / ‖ref‖ allowed: a few roundings of the dtype
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPE = dict(T=67, d=96, k=130, r=17)  # odd on purpose: ragged in every tile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--operators", nargs="+", choices=sorted(_library.OPERATORS), help="only these")
    parser.add_argument("--backends", nargs="+", choices=_library.BACKENDS, default=_library.BACKENDS, help="the same")
    parser.add_argument("--verbose", action="store_true", help="print every line, not only a summary and the failures")


def converted(args: tuple, dtype: torch.dtype, device: str) -> tuple:
    """A copy of ``args`` with floating tensors in ``dtype`` on ``device``."""

    def one(a):
        return a.to(device, dtype, copy=True) if a.is_floating_point() else a.to(device, copy=True)

    return tree_map_only(torch.Tensor, one, args)


def outputs(operator: _library.Operator, call, args: tuple) -> list[torch.Tensor]:
    """What a call computes: its results and its mutated arguments."""
    results = call(*args)
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in operator.default._schema.arguments]
    written = tree_leaves([a for a, m in zip(args, mutated, strict=True) if m])
    return [t for t in tree_leaves(results) if t is not None] + [t for t in written if t.is_floating_point()]


def relative_error(operator, backend: str, args: tuple) -> float:
    """Largest ‖out - ref‖ / ‖ref‖ over the outputs, ref being the reference in float64 on the same (rounded) inputs."""
    exact = outputs(operator, operator.reference, converted(args, torch.float64, "cpu"))
    with backends.use_backend(backend):
        got = outputs(operator, operator, tree_map_only(torch.Tensor, torch.clone, args))
    return largest_error(got, exact)


def largest_error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest ‖got - exact‖ / ‖exact‖ of several tensors; infinite for another shape or a NaN."""
    worst = 0.0
    for g, e in zip(got, exact, strict=True):
        if g.shape != e.shape:
            return float("inf")
        error = (g.to(e.device).double() - e.double()).norm() / e.double().norm().clamp_min(1e-300)
        worst = max(worst, float(error) if error == error else float("inf"))
    return worst


def run(parsed: argparse.Namespace) -> int:
    """Print one line per operator and backend; exit status 1 where anything is red."""
    rows, red = [], 0
    for device in devices():
        for operator in sorted(_library.OPERATORS.values(), key=lambda op: (op.stem, op.name)):
            if parsed.operators and operator.name not in parsed.operators:
                continue
            for backend in parsed.backends:
                if backends.unavailable(operator, backend, device):
                    continue
                worst = {}
                for dtype in DTYPES:
                    samples = arguments(operator.name, **SHAPE, dtype=dtype, device=device)
                    worst[dtype] = max(relative_error(operator, backend, args) for args in samples)
                failed = [dtype for dtype, error in worst.items() if not error <= BOUNDS[dtype]]
                red += bool(failed)
                cells = [f"{worst[dtype]:.1e}" + ("!" if dtype in failed else "") for dtype in DTYPES]
                if parsed.verbose or failed or backends.choose(operator, device).backend == backend:
                    rows.append([device, operator.name, backend, *cells, "RED" if failed else "ok"])
    print(table(["device", "operator", "backend", "float64", "float32", "bfloat16", "float16", ""], rows))
    verdict = f"RED: {red} failed" if red else "All operators agree with the float64 reference"
    print(f"\n{verdict} (relative error; bounds {', '.join(f'{bound:g}' for bound in BOUNDS.values())}).")
    return 1 if red else 0
