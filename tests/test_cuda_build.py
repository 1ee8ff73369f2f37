"""The machine code of the CUDA kernels, without a GPU: what must be tensor-core or 16-byte instructions is.

Spills, warnings and linking are tested in test_build.py, for three generations; what the kernels compute, in
test_cuda_host.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
ARCH = "90a"
INSTRUCTIONS = {  # as they show in SASS
    "HMMA": r"\bHMMA\.",  # warp matrix product
    "MOVM": r"\bMOVM\.",  # 8x8 transpose
    "LDG128": r"\bLDG\.E\S*\.128\b",
    "STG128": r"\bSTG\.E\S*\.128\b",
    "LDGSTS128": r"\bLDGSTS\.E\S*\.128\b",  # asynchronous copy
    "LDS128": r"\bLDS\.128\b",
    "local": r"\b(?:LDL|STL)\b",
    "atomic": r"\b(?:RED|ATOM|ATOMS|ATOMG)\b",
}

pytestmark = pytest.mark.slow


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton brings."""
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def object_of(stem: str) -> Path:
    """The object for ``ARCH``: test_build.py's if it is newer than every source, or one of our own."""
    newest = max(p.stat().st_mtime for p in [*SOURCES.iterdir(), ROOT / "csrc" / "arguments.h"])
    shared = ROOT / "build" / "nvcc" / "cuda" / f"{stem}.sm_{ARCH}.o"
    own = ROOT / "build" / "sass" / f"{stem}.o"
    for path in (shared, own):
        if path.exists() and path.stat().st_mtime > newest and path.stat().st_size > 0:
            return path
    own.parent.mkdir(parents=True, exist_ok=True)
    partial = own.with_suffix(f".{os.getpid()}.o")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{ARCH}"]
    done = subprocess.run(["nvcc", *flags, "-c", SOURCES / f"{stem}.cu", "-o", partial], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return partial.replace(own)


@pytest.fixture(scope="module")
def kernels():
    """How often each instruction of INSTRUCTIONS occurs in each kernel: {name with template arguments: Counter}."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor part of an installed Triton")
    found = {}
    for source in SOURCES.glob("*.cu"):
        text = subprocess.run(
            [tool, "-sass", object_of(source.stem)], capture_output=True, text=True, check=True
        ).stdout
        for part in re.split(r"Function : ", text)[1:]:
            symbol, _, body = part.partition("\n")
            counts = Counter({name: len(re.findall(pattern, body)) for name, pattern in INSTRUCTIONS.items()})
            found[source.stem, symbol] = counts
    return found


def of(kernels, stem, name, arguments=""):
    """The kernels ``name`` of a source, by a pattern on their mangled template arguments."""
    pattern = rf"\d{name}I{arguments}" if arguments else rf"\d{name}[EI]"
    chosen = {symbol: counts for (s, symbol), counts in kernels.items() if s == stem and re.search(pattern, symbol)}
    assert chosen, f"{stem} has no kernel {name} {arguments}"
    return chosen


HALF = r"(?:6__half|13__nv_bfloat16)"


def test_no_local_memory_and_no_atomics(kernels):
    for name, counts in kernels.items():
        assert counts["local"] == 0, name
        assert counts["atomic"] == 0, name  # reductions take two stages, so that they are reproducible


@pytest.mark.parametrize(
    "stem, kernel, instructions",
    [
        ("lowrank", "update_mma", ("HMMA", "LDG128", "STG128")),
        ("lowrank", "backward_mma", ("HMMA", "MOVM", "LDGSTS128", "LDS128", "STG128")),
        ("dora", "norm_mma", ("HMMA", "LDG128", "LDS128")),
        ("bat", "weight_mma", ("HMMA", "LDS128")),
        ("bat", "contract_mma", ("HMMA", "MOVM")),
    ],
)
def test_half_precision_uses_matrix_units(kernels, stem, kernel, instructions):
    chosen = of(kernels, stem, kernel, HALF)
    for symbol, counts in chosen.items():
        for instruction in instructions:
            assert counts[instruction] > 0, (symbol, instruction, counts)


@pytest.mark.parametrize("kernel", ["sampled_product", "spmm_slab"])
def test_slabs_move_16_bytes_at_a_time(kernels, kernel):
    for symbol, counts in of(kernels, "csr", kernel).items():
        assert counts["LDG128"] > 0 and counts["LDS128"] > 0, symbol


@pytest.mark.parametrize(
    "stem, kernel",
    [
        ("lowrank", "update_fma"),
        ("lowrank", "backward_fma"),
        ("dora", "norm_fma"),
        ("bat", "weight_fma"),
        ("bat", "contract_fma"),
    ],
)
def test_single_and_double_precision_never_round_to_tf32(kernels, stem, kernel):
    for symbol, counts in of(kernels, stem, kernel).items():
        assert counts["HMMA"] == 0, symbol


def test_streams_are_16_bytes_wide(kernels):
    wide = r"(?:6__halfLi8E|13__nv_bfloat16Li8E|fLi4E|dLi2E)"
    for symbol, counts in of(kernels, "blocksum", "cyclic_sum", wide).items():
        assert counts["LDG128"] >= (5 if "Lb0E" in symbol else 1), symbol  # four under way, and one for the rest
    for symbol, counts in of(kernels, "dora", "square_rows", wide).items():
        assert counts["LDG128"] > 0, symbol
    for symbol, counts in of(kernels, "blocksum", "tile").items():
        if not re.search(r"Li1E", symbol):
            assert counts["LDG128"] > 0 and counts["STG128"] > 0, symbol
