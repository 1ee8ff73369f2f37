"""What every module that writes or reads files shares: safetensors where it is installed, and whole files or none."""

from __future__ import annotations

import os
from pathlib import Path


def safetensors():
    """The safetensors package, or an ImportError that says how to get it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "safetensors: not installed, wanted to read or write an adapter (pip install safetensors)"
        ) from None
    return safetensors


def write(path: Path, write) -> None:
    """Write beside ``path`` and rename, so that an interrupted save leaves no half of a file under that name."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
