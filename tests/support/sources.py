"""A copy of what the package is built from."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py", "csrc", "spectral_ops",
              "triton_kernels")  # fmt: skip


def copy_of_sources(target: Path) -> Path:
    """Make the folder ``target`` with what is built, without what was built, and return it."""
    target.mkdir(parents=True)
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            hidden = shutil.ignore_patterns("*.so", "__pycache__", "*.partial")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=hidden)
        else:
            shutil.copy(ROOT / name, target / name)
    return target
