"""Packages that may be missing, or are slow to import: needed by one call, or waited for without importing them."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def need(name: str, what: str, mend: str) -> ModuleType:
    """Import an optional package; ImportError where it is missing, with what for and what to ``pip install``."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise ImportError(f"{what} needs {error.name}, which is not installed (pip install {mend})") from None


class Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find, for the one module ``name``, whose loader then calls ``then``.

    It acts while it stands in ``sys.meta_path``, on the next import of the module.
    """

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        for other in list(sys.meta_path):
            if other is not self and hasattr(other, "find_spec"):
                spec = other.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = Loader(spec.loader, self.then)
                    return spec
        return None


class Loader(importlib.abc.Loader):
    """The loader it is given, which the module also gets to keep."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self.loader = loader
        self.then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()
