"""Load the compiled extensions ``_C`` (CPU) and ``_C_cuda``; each only adds implementations, and may be missing."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from spectral_ops import _library


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
    """Import both extensions; a missing or stale one leaves its reason in ``EXTENSIONS`` and raises nothing."""
    expected = _library.schema_hash()
    for extension in EXTENSIONS.values():
        if os.environ.get("SPECTRAL_OPS_NO_EXTENSION") == "1":
            extension.error = "SPECTRAL_OPS_NO_EXTENSION=1 is set"
            continue
        try:
            module = importlib.import_module(extension.module)
        except ModuleNotFoundError:
            extension.error = f"{extension.module} was not built (run `make build`)"
            continue
        except ImportError as error:
            useless = extension.module.endswith("_C_cuda") and torch.version.cuda is None
            mend = f"torch {torch.__version__} has no CUDA" if useless else "run `make build`"
            extension.error = f"{extension.module} does not load: {error} ({mend})"
            continue
        if module.schema_hash != expected:
            extension.error = (
                f"{extension.module} was built for operator schemas {module.schema_hash}, this package has {expected}"
                " (run `make build`)"
            )
            continue
        module.register()  # the kernels enter torch's dispatcher only now, after the check
        extension.library = module
        extension.operators = frozenset(module.operators)
        extension.isa = module.isa() if hasattr(module, "isa") else ""
        extension.info = module.build_info + (f", running {extension.isa}" if extension.isa else "")
        extension.error = None
