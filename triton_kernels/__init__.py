"""Triton implementations, one module per operator stem; installed as ``spectral_ops.triton_kernels``.

Nothing here imports triton until an operator runs. Each module holds its kernels, one table of tile sizes per kernel
(by architecture and element size), and one launcher per operator with the operator's name and its schema's arguments.
An operator has a Triton kernel where its stem's module has a function of its name: that is read from the source. One
that takes further tiles, which the tuner tries, names them as ``tiles: Literal["", "short", "tall"] = ""``.
Launchers use the current stream of the tensors' device, never wait for it, and reduce in a fixed order: two runs give
the same bits. float64 tensors go to the operator's reference, since tensor cores take float64 on some targets only.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable

VARIABLE = "SPECTRAL_OPS_TRITON_CACHE"  # a folder of kernels compiled ahead: see warmed.py


@functools.cache
def _source(stem: str) -> str | None:
    """The text of ``triton_kernels/<stem>.py``; None where there is no such module, or only its bytecode."""
    spec = importlib.util.find_spec(f"{__name__}.{stem}")
    return spec.loader.get_source(spec.name) if spec else None


@functools.cache
def _functions(stem: str) -> frozenset[str]:
    """The names of the functions of ``triton_kernels/<stem>.py``; none where there is no such module."""
    source = _source(stem)
    if source is not None:
        return frozenset(re.findall(r"^def (\w+)", source, re.MULTILINE))  # parsing it takes twenty times as long
    installed = importlib.util.find_spec(f"{__name__}.{stem}") is not None  # without sources
    return frozenset(vars(importlib.import_module(f"{__name__}.{stem}"))) if installed else frozenset()


@functools.cache
def _tiles(stem: str) -> dict[str, tuple[str, ...]]:
    """Every function of ``triton_kernels/<stem>.py`` that takes further tiles, with their names."""
    found = {}
    for node in ast.parse(_source(stem) or "").body:
        for argument in node.args.args if isinstance(node, ast.FunctionDef) else ():
            if argument.arg == "tiles" and isinstance(argument.annotation, ast.Subscript):
                found[node.name] = tuple(filter(None, ast.literal_eval(argument.annotation.slice)))
    return found


def has(stem: str, name: str) -> bool:
    """Whether operator ``name`` has a launcher in ``triton_kernels/<stem>.py``."""
    return name in _functions(stem)


def tiles(stem: str, name: str) -> tuple[str, ...]:
    """The names that a launcher takes as ``tiles``, beside its table's: the tuner's candidates."""
    return _tiles(stem).get(name, ())


def launcher(stem: str, name: str) -> Callable:
    """The launcher of operator ``name`` in ``triton_kernels/<stem>.py``; imports triton on first use."""
    if os.environ.get(VARIABLE):
        importlib.import_module(f"{__name__}.warmed").activate()
    module = importlib.import_module(f"{__name__}.{stem}")
    settle = importlib.import_module(f"{__name__}.common").settle
    for kernel in vars(module).values():
        settle(kernel)
    return getattr(module, name)


def use() -> str | None:
    """How many kernels this process has found compiled ahead, and which not; None where it looks for none."""
    warmed = sys.modules.get(f"{__name__}.warmed")
    return str(warmed.used) if warmed and warmed.used else None
