"""Run a script or a module with every PEFT model in it accelerated, as ``python`` would run it.

Under a launcher it stands in the place of the script: ``torchrun --nproc-per-node 2 -m spectral_ops run train.py``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

import spectral_ops
from spectral_ops.integrations.auto import VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the script or the module is its own."""
    parser.usage = "spectral-ops run [--strict] (SCRIPT | -m MODULE) [ARGUMENT ...]"
    parser.add_argument("--strict", action="store_true", help="raise where a layer would be left to PEFT")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")


def run(arguments: argparse.Namespace) -> int:
    """The exit status is the script's."""
    command = arguments.module or arguments.script
    if not command:
        print("spectral-ops run: got nothing to run, wanted SCRIPT or -m MODULE", file=sys.stderr)
        return 2
    if arguments.local_rank is not None:
        command = [command[0], f"--local_rank={arguments.local_rank}", *command[1:]]
    # also for processes that it starts
    os.environ[VARIABLE] = "strict" if arguments.strict else os.environ.get(VARIABLE) or "1"
    spectral_ops.auto(strict=os.environ[VARIABLE] == "strict")
    sys.argv = list(command)
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P
        sys.path[0] = os.getcwd() if arguments.module else os.path.dirname(os.path.realpath(command[0]))
    if arguments.module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")
    return 0
