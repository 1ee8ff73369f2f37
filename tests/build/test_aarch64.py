"""64-bit Arm: the C++ kernels compile for it from here, and the extension names the libraries that it needs there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}: apt install g++-aarch64-linux-gnu"),
]


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return found or pytest.skip(f"{name} is not on PATH")


def run(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CCACHE_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """What CMake makes of the toolchain file, with the generated headers."""
    folder = tmp_path_factory.mktemp("aarch64")
    cmake = tool("cmake")
    settings = [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'deploy/aarch64.cmake'}"]
    run(cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *settings, f"-DPython_EXECUTABLE={sys.executable}")
    run(cmake, "--build", folder, "--target", "generated_headers", "torch_cpu")
    return folder


def test_every_source_compiles(build):
    """Without code generation, which would take minutes; and no file is compiled for an x86 instruction set."""
    commands = json.loads((build / "compile_commands.json").read_text())
    ours = [command for command in commands if "/csrc/" in command["file"]]
    assert {Path(command["file"]) for command in ours} >= {*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc/bindings_cpu.cpp"}
    for command in ours:
        words = shlex.split(command["command"])
        assert Path(words[0]).name == COMPILER and not any(word.startswith("-mavx") for word in words)
        printed = run(*words[: words.index("-o")], "-fsyntax-only", "-O0", words[-1])
        assert not printed, printed  # warnings


def test_the_extension_names_torchs_library(build):
    """It takes nothing from the empty library that it is linked with, yet the loader has to look for torch's."""
    readelf = tool("aarch64-linux-gnu-readelf")
    assert "AArch64" in run(readelf, "-h", build / "stub/libtorch_cpu.so")
    assert "[libtorch_cpu.so]" in run(readelf, "-d", build / "stub/libtorch_cpu.so")
    _, _, link = (build / "build.ninja").read_text().partition("\nbuild _C.abi3.so:")
    link = link.partition("\nbuild ")[0]
    (flags,) = [line for line in link.splitlines() if line.startswith("  LINK_FLAGS =")]
    assert "stub/libtorch_cpu.so" in link and flags.index("-Wl,--as-needed") < flags.index("-Wl,--no-as-needed")
