"""The Triton kernels that a method launches on a GPU, recorded on a machine without one.

A method's layer runs forward and backward on fake tensors. Each operator that it calls, and that Triton would serve on
the GPU, has its launcher called on meta tensors of the same shapes, strides and dtypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

import spectral_ops
from spectral_ops import _library
from spectral_ops._library import LAYERS, OPERATORS
from spectral_ops.bench import methods
from spectral_ops.bench.counting import Unfolding
from spectral_ops.bench.samples import arguments
from spectral_ops.triton_kernels import has, launcher

Call = tuple[str, tuple]  # an operator, and its arguments on the meta device


class _OnGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, so that the routes of one are taken, and are made where those are that say so."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs or {}))
        return func(*args, **kwargs)


def _meta(args: tuple) -> tuple:
    """The same without memory, as far into its storage: an address divisible by 16 is compiled for apart."""

    def like(t: torch.Tensor) -> torch.Tensor:
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        whole = torch.empty(t.storage_offset() + last + 1, dtype=t.dtype, device="meta")
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    with _disable_current_modes():
        return tree_map_only(torch.Tensor, like, args)


class _Calls(Unfolding):
    """The operators that Triton serves among those that are called inside; those of a layer operator too, where it is
    not among the ``compiled`` ones."""

    def __init__(self, compiled: frozenset[str]) -> None:
        super().__init__()
        self.compiled, self.found = compiled, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # torch itself is to see the tensors as they are
            if func._schema.name.removeprefix(f"{_library.NAMESPACE}::") in self.compiled:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def composing(self):
        with torch._C._EnableTorchFunction(), _OnGPU():
            yield

    def call(self, func, args, kwargs):
        if func.namespace == _library.NAMESPACE:
            self.add(func._schema.name.split("::")[1], args)
        return func(*args, **kwargs)

    def add(self, name: str, args: tuple) -> None:
        if has(OPERATORS[name].stem, name) and name not in self.compiled:
            self.found.append((name, _meta(args)))
        if name == "column_norm":  # what it is where no mode looks on: kept from call to call
            weight, A, B, scale = args
            norm = weight.new_empty(weight.shape[0], dtype=_library.accumulate_dtype(weight.dtype))
            stamp = torch.empty(2, dtype=torch.int64)
            self.add("column_norm_cached_", (norm, stamp, weight, A, B, scale, False))
