"""Devices, builds and what each operator will use; what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import spectral_ops
from spectral_ops import _library, _loader, backends, tuning
from spectral_ops._table import table
from spectral_ops.triton_kernels import VARIABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` takes none."""


def devices() -> list[str]:
    """The device types present: always cpu, and cuda where torch sees a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def warmed() -> list[str]:
    """What the folder of kernels compiled ahead holds, and whether it fits."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return [f"Triton kernels compiled ahead: {VARIABLE} is not set"]
    if backends.triton_missing():
        return [f"Triton kernels compiled ahead: {folder}, and no triton to read them"]
    from spectral_ops.triton_kernels.warmed import describe

    path = Path(folder).absolute()
    return [f"Triton kernels compiled ahead: {path}", *(f"  {line}" for line in describe(path)[0])]


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 also where something optional is missing."""
    print(f"spectral_ops {spectral_ops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"triton {_version('triton')}, peft {_version('peft')}, transformers {_version('transformers')}\n")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, torch uses {capability}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        print("cuda: torch sees no GPU" + ("" if torch.version.cuda else " (and is a build without CUDA)"))
    print()
    mend = []
    for name, extension in _loader.EXTENSIONS.items():
        state = extension.error or f"{len(extension.operators)} operators; {extension.info}"
        print(f"extension {extension.module}: {state}")
        if extension.error and (name == "cpu" or torch.cuda.is_available()):
            mend.append("make build        # or: pip install --no-build-isolation -e .")
    if missing := backends.triton_missing():
        print(f"triton: {missing}")
        if torch.cuda.is_available():
            mend.append("pip install triton==3.6.0")
    for device in devices():
        path = tuning.file(torch.device(device))
        state = f"{len(tuning.read(path))} operators in {path}" if path and path.exists() else "no table"
        print(f"tuned choices on {device}: {state}")
    print("\n".join(warmed()))
    print(f"schemas: {_library.schema_hash()}\n")
    rows = []
    for operator in sorted(_library.OPERATORS.values(), key=lambda op: (op.stem, op.name)):
        for device in devices():
            choice = backends.choose(operator, device)
            reason = "" if choice.backend != "reference" else choice.reason
            rows.append([operator.stem, operator.name, device, choice.backend, reason])
    print(table(["row", "operator", "device", "backend", "why the reference"], rows))
    if mend:
        print("\nTo mend what is missing:\n  " + "\n  ".join(dict.fromkeys(mend)))
    return 0
