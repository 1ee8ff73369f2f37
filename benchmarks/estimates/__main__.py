"""The command line of the estimates; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.estimates import table
from spectral_ops._table import table as text

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("operator", "T", "W", "before", "us", "% of roofline", "bound")


def cells(row: table.Row) -> list[str]:
    bound = " + ".join(kernel.bound for kernel in row.kernels)
    name = f"{row.operator} {row.label}".strip()
    return [
        name,
        str(row.tokens),
        f"{row.d}x{row.k}",
        row.before or "-",
        f"{1e6 * row.seconds:.1f}",
        f"{100 * row.share:.0f}",
        bound,
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__)
    made.add_argument("--objects", type=Path, default=ROOT / "build" / "nvcc" / "cuda", help="of a build for sm_90a")
    made.add_argument("--triton", action="store_true", help="the Triton kernels' rows too, which are compiled for it")
    made.add_argument("--write", action="store_true", help="h100.json and docs/PERFORMANCE.md")
    made.add_argument("--measure", action="store_true", help="time the operators on this device, beside h100.json")
    made.add_argument("--device", default="cuda")
    made.add_argument("--tokens", type=int, nargs="+")
    made.add_argument("--shrink", type=int, default=1, help="divides every size, for a try without a GPU")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--seconds", type=float, default=120.0, help="measuring stops at the next case after these")
    made.add_argument("--json", type=Path, help="with --measure: where the results go, after every case")
    return made


def main(arguments: argparse.Namespace) -> int:
    if arguments.measure:
        from benchmarks.estimates import measure

        return measure.run(arguments)
    rows = list(table.compiled(arguments.objects))
    if arguments.triton or arguments.write:
        from benchmarks.estimates import triton

        rows += triton.compiled()
    print(text(HEAD, [cells(row) for row in rows]))
    if arguments.write:
        from benchmarks import publish

        table.write(rows)
        publish.write_estimates(ROOT / "docs" / "PERFORMANCE.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
