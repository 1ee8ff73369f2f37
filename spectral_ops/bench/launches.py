"""The Triton kernels that a method launches on a GPU, recorded on a machine without one.

A method's layer runs forward and backward on fake tensors. Each operator that it calls, and that Triton would serve on
the GPU, has its launcher called on meta tensors of the same shapes, strides and dtypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
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
from spectral_ops._library import OPERATORS
from spectral_ops.bench import methods
from spectral_ops.bench.counting import Unfolding
from spectral_ops.bench.samples import arguments
from spectral_ops.functional import rosa_routes
from spectral_ops.triton_kernels import aot, has, launcher

Call = tuple[str, tuple]  # an operator, and its arguments on the meta device


class _OnGPU(TorchFunctionMode):
    """Tensors say that they are on a GPU, so that its routes are taken. New ones are made beside them."""

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


@dataclass(frozen=True)
class Sizes:
    """What a method's layers are recorded for: every combination."""

    tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # [out, in]
    ranks: tuple[int | None, ...] = (None,)  # None: the method's usual one
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    wide_adapters: tuple[bool, ...] = (True,)  # float32 parameters, as PEFT makes them, or the layer's dtype
    biases: tuple[bool, ...] = (False,)


ALSO = {
    "adalora": "importance",
    "adalora_dash": "importance",
    "rosa": "csr",
}  # rows that a method calls outside its layers


def of_method(name: str, sizes: Sizes, compiled: frozenset[str] = frozenset()) -> list[Call]:
    """The operators that Triton serves in layers of method ``name``, forward and backward, with and without dropout and
    a gradient of x. ``compiled``: operators, of layers too, that have CUDA kernels."""
    fields = methods.METHODS[name].build().__dict__
    found: list[Call] = []
    ways = [(0.0, True), (0.0, False)] + [(0.1, True)] * ("lora_dropout" in fields)
    for d, k in sizes.shapes:
        pattern = methods.pattern_of(name, d, k)
        for dtype, wide, bias, rank in itertools.product(sizes.dtypes, sizes.wide_adapters, sizes.biases, sizes.ranks):
            with FakeTensorMode(allow_non_fake_inputs=True):
                linear = nn.Linear(k, d, bias=bias, dtype=dtype).requires_grad_(False)
                for p, gradient in ways:
                    for forward in _forwards(name, linear, pattern, wide, rank, p):
                        for T in sizes.tokens:
                            x = torch.empty(T, k, dtype=dtype, requires_grad=gradient)
                            with _Calls(compiled) as calls:
                                y = forward(x)
                                y.backward(torch.empty_like(y))
                            found += calls.found
    for operator in OPERATORS.values():
        if operator.stem == ALSO.get(name) and operator.name not in compiled and has(operator.stem, operator.name):
            found += of_operator(operator.name, sizes)
    return found


def _forwards(name, linear, pattern, wide: bool, rank: int | None, p: float) -> Iterator[Callable]:
    """The forward of a layer; of RoSA one for every route, for which is taken goes by the device."""
    fields = {"lora_dropout": p} if p else {}
    if rank is not None:
        fields["init_r" if name.startswith("adalora") else "r"] = rank
        if name == "mini":
            fields["mini_r"] = rank
    forward, trained = methods.layer(name, linear, pattern, autocast_adapter_dtype=wide, **fields)
    if name != "rosa":
        yield forward
        return
    (A, B, _), scale = trained, methods.METHODS[name].build(**fields).scaling
    for route, gradient_route in itertools.product(("spmm", "scatter"), rosa_routes.GRADIENT_ROUTES):
        yield lambda x, route=route, gradient_route=gradient_route: spectral_ops.rosa_linear(
            x, linear.weight, pattern, A, B, linear.bias, scale=scale, route=route, gradient_route=gradient_route,
            dropout_p=p, training=True,
        )  # fmt: skip


def of_operator(name: str, sizes: Sizes) -> Iterator[Call]:
    """An operator's own samples, at most 512 tokens and 1024 features of the same remainders by 16: what is compiled
    depends on no more, but for how far a launch is split."""
    least = lambda n, most: n if n <= most else most + n % 16  # noqa: E731
    small = {
        (least(T, 512), least(d, 1024), least(k, 1024), rank or methods.RANK)
        for T, (d, k), rank in itertools.product(sizes.tokens, sizes.shapes, sizes.ranks)
    }
    for size, dtype in itertools.product(sorted(small), sizes.dtypes):
        for args in arguments(name, *size, dtype, "cpu"):
            yield name, _meta(args)


def record(calls: Iterable[Call], target: int, processors: tuple[int, ...], tiles: dict[str, set[str]]) -> dict:
    """The launches of those calls on a GPU of compute capability ``target``, one for each that is compiled apart.

    processors: of the cards. tiles: by operator the other tiles that a table of measured choices may ask for.
    """
    found: dict[tuple, aot.Launch] = {}
    for name, args in calls:
        run = launcher(OPERATORS[name].stem, name)
        for n, other in itertools.product(processors, sorted({""} | tiles.get(name, set()))):
            with aot.recorded(target, n) as launches:
                run(*args, **({"tiles": other} if other else {}))
            for launch in launches:
                found.setdefault(aot.key(launch), launch)
    return found
