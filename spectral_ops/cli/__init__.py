"""Command line: ``python -m spectral_ops info | check | bench | cost | tune | warmup | run`` (or ``spectral-ops``)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process' exit status."""
    from spectral_ops.cli import bench, check, cost, info, run, tune, warmup

    parser = argparse.ArgumentParser(
        prog="spectral-ops", description="Fused adapter operators: what runs, is it right, how fast."
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it before the script's own
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (info, check, bench, cost, tune, warmup, run):
        name = module.__name__.rsplit(".", 1)[1]
        description = module.__doc__ or ""
        command = commands.add_parser(name, help=description.split("\n")[0], description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
