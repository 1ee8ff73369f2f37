"""The options of ``bench`` that measure nothing: what it makes of the results files of earlier runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import publish
from spectral_ops.bench import compare, pictures
from spectral_ops.bench.results import Results, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--png", type=Path, metavar="DIR", help="draw the results into DIR")
    group = parser.add_argument_group("results that are there, instead of measuring")
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="what is faster or slower in the results file B than in A; exit status 1 on a regression",
    )
    group.add_argument("--draw", metavar="FILE", help="with --png: draw a results file")
    group.add_argument("--readme", metavar="FILE", help="print README's table of a results file")
    group.add_argument("--write", type=Path, metavar="README", help="with --readme: put the table between its markers")


def draw(results: Results, directory: Path) -> None:
    """Draw, and say what was drawn."""
    files = pictures.draw(results, directory)
    print(
        "\n".join(f"drawn: {path}" for path in files) or "nothing drawn: no layers, operators or growth were measured"
    )


def run(arguments: argparse.Namespace) -> int | None:
    """Do what was asked of results files, and return the exit status; None where it was nothing."""
    if arguments.draw and not arguments.png:
        raise SystemExit("bench --draw: got no --png, wanted the directory to draw into")
    if arguments.write and not arguments.readme:
        raise SystemExit("bench --write: got no --readme, wanted the results file whose table to write")
    if arguments.readme:
        table = read(arguments.readme)
        if arguments.write:
            publish.write(table, arguments.write)
            print(f"results of {arguments.readme} written to {arguments.write}")
        else:
            print(publish.render(table))
    if arguments.draw:
        draw(read(arguments.draw), arguments.png)
    if arguments.compare:
        text, worse = compare.report(*map(read, arguments.compare))
        print(text)
        return 1 if worse else 0
    return 0 if arguments.readme or arguments.draw else None
