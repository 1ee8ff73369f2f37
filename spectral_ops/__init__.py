"""Fused adapter operators for parameter-efficient fine-tuning. The README is the way in."""

import gc
import importlib.util

# triton_kernels lies at the top level of a checkout; a symbolic link leads there
if importlib.util.find_spec("spectral_ops.triton_kernels") is None:
    raise ImportError(
        "spectral_ops.triton_kernels: got a checkout without symbolic links, or an archive; wanted an installed"
        " package (pip install .), or links (git config core.symlinks true, git checkout spectral_ops/triton_kernels)"
    )

# What is made here stays: a collection meanwhile walks all of torch, for nothing and as long as the rest of this takes
_collecting = gc.isenabled()
gc.disable()
try:
    from spectral_ops import _loader, adapters, backends, functional
    from spectral_ops._version import __commit__ as __commit__
    from spectral_ops._version import __version__ as __version__
    from spectral_ops.adapters import *
    from spectral_ops.backends import BackendUnavailable, explain, use_backend
    from spectral_ops.functional import *
    from spectral_ops.integrations import accelerate, as_peft_model, report, restore
    from spectral_ops.integrations.auto import auto, from_environment

    _loader.load()
    backends.activate()
    from_environment()
finally:
    if _collecting:
        gc.enable()


__all__ = [
    *adapters.__all__,
    *functional.__all__,
    "BackendUnavailable",
    "accelerate",
    "as_peft_model",
    "auto",
    "explain",
    "report",
    "restore",
    "use_backend",
]
