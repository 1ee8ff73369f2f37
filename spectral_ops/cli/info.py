"""Devices, builds and what each operator will use; what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import spectral_ops
from spectral_ops import _library, _loader, backends, tuning
from spectral_ops._table import table
from spectral_ops.triton_kernels import VARIABLE

DRIVERS = {11: 450, 12: 525, 13: 580}  # by CUDA's major version, the least driver: minor versions are compatible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info`` takes none."""


def built_for() -> list[str]:
    """What an audited wheel says that it needs besides torch: the C library, and for CUDA architectures and driver."""
    try:
        return importlib.metadata.metadata("spectral_ops").get_all("Supported-Platform") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return []


def devices() -> list[str]:
    """The device types present: always cpu, and cuda where torch sees a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def driver(path: str = "/proc/driver/nvidia/version") -> tuple[int, ...] | None:
    """The version of the NVIDIA driver in this kernel, asked without starting CUDA; None where there is none."""
    try:
        found = re.search(r"\b\d{3,}(?:\.\d+)+", Path(path).read_text())
    except OSError:
        return None
    return tuple(map(int, found[0].split("."))) if found else None


def no_gpu() -> str:
    """Why torch sees no GPU, as far as that can be said."""
    if torch.version.hip or torch.version.cuda is None:
        return "a build for ROCm" if torch.version.hip else "and is a build without CUDA"
    version = torch.version.cuda
    least = DRIVERS.get(int(version.partition(".")[0]))
    wanted = f"CUDA {version} needs driver {least} or newer" if least else f"it is for CUDA {version}"
    if (found := driver()) is None:
        return f"no NVIDIA driver on this machine, as on a login node; {wanted}"
    name = ".".join(map(str, found))
    if least and found[0] < least:
        return f"driver {name} is too old: {wanted}; update it, or install a torch for an older CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"driver {name} is there" + (f"; CUDA_VISIBLE_DEVICES={visible!r}" if visible is not None else "")


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
    version, commit = spectral_ops.__version__, spectral_ops.__commit__
    version += f" (commit {commit[:7]})" if commit and commit[:7] not in version else ""
    print(f"spectral_ops {version}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"triton {_version('triton')}, peft {_version('peft')}, transformers {_version('transformers')}\n")
    for line in built_for():
        print(f"wheel: {line}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, torch uses {capability}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        print(f"cuda: torch sees no GPU ({no_gpu()})")
    print()
    mend = []
    for name, extension in _loader.EXTENSIONS.items():
        state = extension.error or f"{len(extension.operators)} operators; {extension.info}"
        print(f"extension {extension.module}: {state}")
        if extension.error and (name == "cpu" or torch.cuda.is_available()):
            mend += re.findall(r"\(([^()]*)\)$", extension.error)  # each names its own remedy last
    if missing := backends.triton_missing():
        print(f"triton: {missing}")
        if torch.cuda.is_available():
            mend.append("pip install 'spectral_ops[triton]'")
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
