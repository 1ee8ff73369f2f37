"""Load the compiled extensions ``_C`` (CPU) and ``_C_cuda``; each only adds implementations, and may be missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from spectral_ops import _library

LEAST_TORCH = (2, 10)  # the stable ABI that the extensions are compiled for
MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF header
CHECKOUT = (Path(__file__).parent.parent / "CMakeLists.txt").is_file()
REINSTALL = "pip install --force-reinstall --no-deps"
MEND = "run `make build`" if CHECKOUT else f"`{REINSTALL}` this machine's spectral_ops wheel, or the py3-none-any one"


@dataclass
class Extension:
    """One compiled extension: the operators it implements, or why it is not there."""

    module: str
    operators: frozenset[str] = frozenset()
    error: str | None = "not loaded yet"
    info: str = ""
    library: ModuleType | None = None
    isa: str = ""  # the CPU's instruction set that its kernels run on


EXTENSIONS = {"cpu": Extension("spectral_ops._C"), "cuda": Extension("spectral_ops._C_cuda")}


def load() -> None:
    """Import both extensions; a missing or unfit one leaves its reason in ``EXTENSIONS`` and raises nothing."""
    for extension in EXTENSIONS.values():
        extension.error = _load(extension)


def _load(extension: Extension) -> str | None:
    """Import one extension and register its kernels; or return why not, and what to do, in one line."""
    if os.environ.get("SPECTRAL_OPS_NO_EXTENSION") == "1":
        return "SPECTRAL_OPS_NO_EXTENSION=1 is set"
    name = extension.module
    if name not in sys.modules and (reason := _unfit(name)):
        return reason
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        file = "" if str(error.path) in str(error) else f"{error.path}: "
        return f"{name} does not load with torch {torch.__version__}: {file}{error} ({MEND})"
    if reason := _other_cuda(module.build_info):
        return f"{name} {reason}"
    expected = _library.schema_hash()
    if module.schema_hash != expected:
        return f"{name} was built for operator schemas {module.schema_hash}, this package has {expected} ({MEND})"
    module.register()  # the kernels enter torch's dispatcher only now, after the checks
    extension.library = module
    extension.operators = frozenset(module.operators)
    extension.isa = module.isa() if hasattr(module, "isa") else ""
    extension.info = module.build_info + (f", running {extension.isa}" if extension.isa else "")
    return None


def _unfit(name: str) -> str | None:
    """Why a module is not to be handed to dlopen; None where it may be."""
    if name == "spectral_ops._C_cuda" and torch.version.cuda is None:
        return f"{name} is not loaded: torch {torch.__version__} has no CUDA"
    spec = importlib.util.find_spec(name)
    if spec is None:
        if CHECKOUT:
            return f"{name} was not built ({MEND})"
        wheel = "a cp310-abi3 wheel" if torch.version.cuda is None else f"the wheel +cu{torch.version.cuda[:2]}x"
        return f"{name} is not in this wheel (`{REINSTALL}` {wheel} of spectral_ops)"
    least = ".".join(map(str, LEAST_TORCH))
    if tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups())) < LEAST_TORCH:
        return (
            f"{name} was built for torch >= {least}, this is {torch.__version__}; the reference and Triton serve"
            f" (pip install 'torch>={least}')"
        )
    if reason := damage(Path(spec.origin)):
        return f"{name} does not load: {spec.origin}: {reason} ({MEND})"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a shared library's file; None where it is whole, readable and for this machine.

    dlopen maps a file that was cut short, and the process dies when it reads the part that is not there.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
            if not head.startswith(b"\x7fELF") or len(head) < 64:
                return f"not a shared library ({size} bytes)"
            if head[4:6] != b"\x02\x01":
                return "not a 64-bit little-endian shared library"
            machine, segments, sections = struct.unpack_from("<H12xQQ", head, 18)
            segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", head, 54)
            if (built := MACHINES.get(machine, f"ELF machine {machine}")) != platform.machine():
                return f"built for {built}, this machine is {platform.machine()}"
            file.seek(segments)
            table = file.read(segment_size * segment_count)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    ends = [segments + segment_size * segment_count, sections + section_size * section_count]
    if len(table) == segment_size * segment_count:  # of each segment, its offset and its size in the file
        starts = (struct.unpack_from("<8xQ16xQ", table, segment_size * i) for i in range(segment_count))
        ends += [offset + length for offset, length in starts]
    return f"cut short, {size} of {max(ends)} bytes" if size < max(ends) else None


def cuda_build(info: str) -> tuple[str, tuple[str, ...]] | None:
    """The CUDA version of an extension's ``build_info`` and its architectures ("9.0a", "12.0+PTX"); None without."""
    found = re.match(r"nvcc ([\d.]+),.* ([\d.af|+PTX]+), torch ", info)
    return (found[1], tuple(found[2].split("|"))) if found else None


def _other_cuda(info: str) -> str | None:
    """Why an extension does not go with this torch's CUDA. Its runtime is linked in: only a launch would fail."""
    built = cuda_build(info)
    major = (torch.version.cuda or "").partition(".")[0]
    if built is None or not major or built[0].partition(".")[0] == major:
        return None
    mend = f"build it with an nvcc of CUDA {major}" if CHECKOUT else f"{REINSTALL} the wheel +cu{major}x"
    return f"was built for CUDA {built[0]}, torch {torch.__version__} is for CUDA {torch.version.cuda} ({mend})"


def has_image(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for one of ``architectures`` runs on a device: the same or an older minor version of one major, an
    ``a`` on that very version alone, and PTX on whatever is newer."""
    for architecture in architectures:
        major, minor, only, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture).groups()
        built = int(major), int(minor)
        if built == capability or (only != "a" and built[0] == capability[0] and built <= capability):
            return True
        if ptx and not only and built <= capability:
            return True
    return False
