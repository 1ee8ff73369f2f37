"""Which kernels an operator launches, with how many blocks, threads and bytes of shared memory.

They come from the operator's own host code, compiled for the emulator (tests/kernels/cuda_emulator), which writes its
launches down instead of executing them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.estimates.sass import plain
from tests.kernels.conftest import ROOT, build_emulator

LIBRARY = ROOT / "build" / "emulator" / "libspectral_ops_emulated.so"


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid; ``product``: the sizes (m, n, k) of a product that the library makes."""

    kernel: str
    blocks: int = 0
    threads: int = 0
    dynamic: int = 0
    product: tuple[int, int, int] | None = None


@functools.cache
def _names(library: Path) -> dict[int, str]:
    """Kernels by their offset in the library."""
    text = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    split = (line.split(" ", 2) for line in text.splitlines())
    return {int(at, 16): plain(name) for at, _, name in split if at.strip()}


def numbers(function, *arguments: int) -> list[int]:
    """What a function of the emulator's library fills out."""
    out = (ctypes.c_int64 * 16)()
    count = function(*map(ctypes.c_int64, arguments), out)
    return list(out[:count])


def plan(name: str, *sizes: int) -> list[int]:
    """What a plan of csrc/cuda/<stem>.h says for these sizes; tests/kernels/cuda_emulator/library.cpp has the order."""
    return numbers(getattr(build_emulator().plans, f"{name}_of"), *sizes)


def recorded(name: str, args: tuple) -> list[Launch]:
    """The launches of operator ``name`` on CPU tensors, whose values nothing reads."""
    operators = build_emulator()
    library = operators.plans
    word = ctypes.c_int64.in_dll
    here, names = ctypes.addressof(word(library, "emulator_launches")), _names(LIBRARY)
    base = here - next(at for at, symbol in names.items() if symbol == "emulator_launches")
    dry, count = word(library, "emulator_dry"), word(library, "emulator_logged")
    dry.value, count.value = 1, 0
    chosen = os.environ.get("EMULATOR_HOPPER")
    os.environ["EMULATOR_HOPPER"] = chosen or "1"  # an H100's launches, unless the caller wants others
    try:
        getattr(operators, name)(*args)
    finally:
        dry.value = 0
        if chosen is None:
            del os.environ["EMULATOR_HOPPER"]
    log = (ctypes.c_int64 * 256).in_dll(library, "emulator_log")
    rows = [log[4 * i : 4 * i + 4] for i in range(count.value)]
    return [Launch(names[kernel - base], *sizes) if kernel else Launch("library", product=tuple(sizes))
            for kernel, *sizes in rows]  # fmt: skip
