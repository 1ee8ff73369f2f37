"""Reads compiled kernels: registers and shared memory, and the instructions of every loop, from ``cuobjdump``."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.estimates.model import Code

RESERVED = 1024  # bytes of a block on sm_90, which the report counts where a kernel has shared memory of its own
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);")
_USAGE = re.compile(r"Function ([^:\n]+):\s*\n\s*REG:(\d+)[^\n]*?SHARED:(\d+)")


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton brings."""
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def _run(*command) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def loops(body: str) -> list[list[str]]:
    """The opcodes, modifiers included, between each backward branch and its target."""
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in _LINE.findall(body)]
    found = []
    for at, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.split(".")[0] == "BRA" and target and int(target[1], 16) < at:
            found.append([op for where, op, _ in instructions if int(target[1], 16) <= where <= at])
    return found


@functools.cache
def kernels(object_file: Path) -> dict[str, Code]:
    """The kernels of an object for sm_90a, by name and template arguments as C++ writes them."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("cuobjdump is neither on PATH nor part of an installed Triton")
    which = ("-arch", "sm_90a")
    usage = {name: (int(reg), int(shared)) for name, reg, shared in
             _USAGE.findall(_run(tool, "-res-usage", *which, object_file))}  # fmt: skip
    parts = re.split(r"Function : ", _run(tool, "-sass", *which, object_file))[1:]
    bodies = dict(part.split("\n", 1) for part in parts)
    demangled = demangle(list(bodies))
    found = {}
    for symbol, body in bodies.items():
        registers, shared = usage[symbol]
        found[demangled[symbol]] = Code(registers, max(shared - RESERVED, 0), loops(body))
    return found


def demangle(symbols: list[str]) -> dict[str, str]:
    """``name<arguments>`` of each symbol, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return dict(zip(symbols, map(plain, text.splitlines()), strict=True))


def plain(name: str) -> str:
    """``void spectral_ops::cuda::(anonymous namespace)::f<__half, 2>(...)`` as ``f<__half, 2>``."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|spectral_ops::cuda::|^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return name.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", "")
