"""Kernels compiled ahead of time, for a GPU that need not be here.

Launchers run on meta tensors of real sizes, and every launch is recorded instead of made. A recorded launch then goes
the way of a real one, through Triton's own ``JITFunction.run``, under a driver that does nothing but name its target.
So what is compiled is what would run, and Triton keeps it under the key that the real launch will look up.
"""

from __future__ import annotations

import hashlib
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from spectral_ops.triton_kernels import common

# compute capability -> processors of its cards: how far a launch is split goes by them, and with it what is compiled
TARGETS = {
    80: (108, 56),  # A100, A30
    86: (84, 82, 72),  # A40, RTX 3090, A10
    89: (142, 128, 58),  # L40S, RTX 4090, L4
    90: (132, 114, 78),  # H100 SXM and H200, H100 PCIe, H20
    100: (148,),  # B200
    103: (148,),  # B300
    120: (188, 170),  # RTX PRO 6000, RTX 5090
}


class Launch(NamedTuple):
    """One launch as a launcher asked for it."""

    kernel: JITFunction
    grid: tuple
    args: tuple
    kwargs: dict[str, Any]


@contextmanager
def recorded(target: int, processors: int | None = None) -> Iterator[list[Launch]]:
    """Launches made inside go into a list; launchers see a GPU of compute capability ``target`` (90: 9.0), with the
    ``processors`` of its first card where none are given. Process-wide, and not for threads that launch for real."""
    launches: list[Launch] = []
    run, before = JITFunction.run, common.pretended
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(Launch(self, grid, args, kwargs))
    common.pretended = common.column(target // 10), processors or TARGETS[target][0]
    try:
        yield launches
    finally:
        JITFunction.run, common.pretended = run, before


class _Driver:
    """What ``JITFunction.run`` asks a driver for before it launches."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)
        self.device = object()  # a new one each time: what was compiled before is not at hand without its file

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling(target: int) -> Iterator[None]:
    """Make :func:`compiled` and :func:`key` compile for compute capability ``target``."""
    before = driver._active  # not .active, which looks for a GPU
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


def compiled(launch: Launch) -> Any:
    """Triton's ``CompiledKernel`` of a recorded launch, under :func:`compiling`; from a cache where it is there."""
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)


def key(launch: Launch) -> tuple[str, str]:
    """What tells apart the launches that are compiled apart, under :func:`compiling`; compiles nothing."""
    found = []
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = lambda *, key, **_: found.append(key) or True  # True: compile nothing
    try:
        compiled(launch)
    finally:
        knobs.runtime.jit_cache_hook = before
    return f"{launch.kernel.__module__}.{launch.kernel.__qualname__}", *found


# --- what Triton compiles with the C compiler ------------------------------------------------------------------------


def _build_only(src: str, name: str, library_dirs=None, include_dirs=None, libraries=None, ccflags=None) -> object:
    """As Triton's ``compile_module_from_src``, but what was built is not loaded: that takes a driver."""
    cache = get_cache_manager(hashlib.sha256((src + build.platform_key()).encode()).hexdigest())
    file = name + sysconfig.get_config_var("EXT_SUFFIX")
    if cache.get_file(file) is None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{name}.c"
            source.write_text(src)
            made = build._build(name, str(source), folder, library_dirs, include_dirs, libraries, ccflags or [])
            cache.put(Path(made).read_bytes(), file, binary=True)
    return _Loaded()


class _Loaded:
    """What was built, as far as Triton looks at it: names of functions that nobody calls."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def host_functions() -> Iterator[None]:
    """Make :func:`host_function` work where there is no driver: it links against an empty library of libcuda's name."""
    before = dict(vars(nvidia))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        empty = ["-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{library.name}", "-o", str(library)]
        subprocess.run(["cc", *empty], check=True, capture_output=True)
        library.with_suffix("").symlink_to(library.name)
        nvidia.library_dirs = lambda: [nvidia.libdevice_dir, folder]
        nvidia.compile_module_from_src = _build_only
        try:
            nvidia.CudaUtils.__init__(SimpleNamespace())
            yield
        finally:
            vars(nvidia).update(before)


def host_function(kernel: Any) -> None:
    """Build the C function that hands a kernel's arguments to the driver; else Triton builds it at the first launch.
    From Triton 3.7 on one serves all kernels, which :func:`host_functions` has built."""
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)
