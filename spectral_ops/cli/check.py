"""Numerical self-test of every operator on every device, dtype and backend present, against float64."""

from __future__ import annotations

import argparse
from itertools import islice

from spectral_ops import _library, backends
from spectral_ops._table import table
from spectral_ops.bench.judge import BOUNDS, relative_error, wrong
from spectral_ops.bench.samples import arguments
from spectral_ops.cli.info import devices

SHAPE = dict(T=67, d=96, k=130, r=17)  # odd on purpose: ragged in every tile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--operators", nargs="+", choices=sorted(_library.OPERATORS), help="only these")
    parser.add_argument("--backends", nargs="+", choices=_library.BACKENDS, default=_library.BACKENDS, help="the same")
    parser.add_argument("--samples", type=int, help="of each operator's sample arguments the first so many")
    parser.add_argument("--verbose", action="store_true", help="print every line, not only a summary and the failures")


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
                for dtype in BOUNDS:
                    samples = islice(arguments(operator.name, **SHAPE, dtype=dtype, device=device), parsed.samples)
                    try:
                        with backends.use_backend(backend):
                            worst[dtype] = max(relative_error(operator, args, "cpu") for args in samples)
                    except Exception as error:  # a kernel that does not compile or start, or that lost the GPU
                        worst[dtype] = float("nan")
                        message = str(error).partition("\n")[0]
                        print(f"{operator.name} raised on {device}, {backend}: {message}", flush=True)
                failed = [dtype for dtype, error in worst.items() if wrong(error, BOUNDS[dtype])]
                red += bool(failed)
                cells = [f"{worst[dtype]:.1e}" + ("!" if dtype in failed else "") for dtype in BOUNDS]
                if failed:  # at once, for what comes after may not end
                    print(f"RED: {operator.name} on {device}, {backend}: {' '.join(cells)}", flush=True)
                if parsed.verbose or failed or backends.choose(operator, device).backend == backend:
                    rows.append([device, operator.name, backend, *cells, "RED" if failed else "ok"])
    print(table(["device", "operator", "backend", "float64", "float32", "bfloat16", "float16", ""], rows))
    verdict = f"RED: {red} failed" if red else "All operators agree with the float64 reference"
    print(f"\n{verdict} (relative error; bounds {', '.join(f'{bound:g}' for bound in BOUNDS.values())}).")
    return 1 if red else 0
