"""What a piece of code computes and moves, counted operator by operator without running it.

Under :func:`counted` every dispatched operator adds its floating-point operations and the least bytes that must cross
memory: our operators by their registered formula, the library's by torch's FLOP formulas and the sizes of what they
read and write. With fake tensors (``torch._subclasses.FakeTensorMode``) nothing is computed, so a 70B model's layer
takes no memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from spectral_ops._library import LAYERS, NAMESPACE, OPERATORS
from spectral_ops.bench import methods

# dense bf16 FLOP/s and bytes/s that large products and copies reach, below the data sheet's peaks; none was measured
CEILINGS = {"sm_80": (2.6e14, 1.7e12), "sm_90": (7.9e14, 3.0e12), "sm_100": (1.6e15, 7.0e12)}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias",
        "lift_fresh", "set_", "resize_", "is_same_size", "_local_scalar_dense"}  # fmt: skip


class Call(list[tuple[int, int]]):
    """One operator's share: floating-point operations and least bytes of each of its calls."""

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self)

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self)


class Counts(dict[str, Call]):
    """Calls by operator name."""

    @property
    def flops(self) -> int:
        return sum(call.flops for call in self.values())

    @property
    def bytes(self) -> int:
        return sum(call.bytes for call in self.values())

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline floor: every call at its own bound, one after the other."""
        each = (pair for call in self.values() for pair in call)
        return sum(max(flops / flops_per_second, moved / bytes_per_second) for flops, moved in each)


def _bytes(func, args, kwargs, out) -> int:
    """Bytes of the distinct tensors read, and of those written."""
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    outs = {n for n in written if n == "out" or n.startswith("out")}  # only written; others are read as well
    read = [t for name, value in named.items() if name not in outs for t in tree_leaves(value)]
    written_tensors = [t for name in written for t in tree_leaves(named.get(name))] or tree_leaves(out)
    distinct = [{id(t): t for t in group if isinstance(t, torch.Tensor)} for group in (read, written_tensors)]
    return sum(t.numel() * t.element_size() for group in distinct for t in group.values())


class Unfolding(TorchDispatchMode):
    """A mode that sees the pieces and products of every layer operator in its place, by :meth:`call`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        layer = LAYERS.get(func._schema.name.removeprefix(f"{NAMESPACE}::"))
        if layer is not None:
            self.enter(func, args)
            with self, self.composing(), torch.no_grad():
                return layer.reference(*args)
        if func.namespace == "aten":  # inside a layer torch takes no composite operator apart before a mode sees it
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return self.call(func, args, kwargs)

    def enter(self, func, args) -> None:
        """Told of a layer operator before its pieces."""

    def composing(self) -> AbstractContextManager:
        """What is entered while a layer operator is composed."""
        return nullcontext()

    def call(self, func, args, kwargs):
        """Runs one operator that is no layer."""
        raise NotImplementedError


class _Counter(Unfolding):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def call(self, func, args, kwargs):
        packet = func._overloadpacket
        name = func._schema.name.split("::")[1]
        out = func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            cost = OPERATORS[name].cost(*args, **kwargs)
            flops, moved = cost.flops, cost.bytes
        elif func.is_view or name in FREE or func.namespace not in ("aten", "prims"):
            return out
        else:
            formula = flop_registry.get(packet)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            moved = _bytes(func, args, kwargs, out)
        self.counts.setdefault(name, Call()).append((flops, moved))
        return out


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of everything dispatched inside, the backward pass included if it runs inside."""
    counts = Counts()
    with _Counter(counts):
        yield counts


def saved_bytes(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, constants: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages held for backward after ``forward(x)``, besides those of x and ``constants``."""
    known = {t.untyped_storage()._cdata for t in (x, *constants)}
    held: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        for part in (t._indices(), t._values()) if t.layout is torch.sparse_coo else (t,):
            storage = part.untyped_storage()
            if storage._cdata not in known:
                held[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(x)  # alive here, so that no address is reused while counting
    del out
    return sum(held.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during ``call`` beyond those it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


@dataclass
class Cost:
    """One layer, forward and backward."""

    trained: int
    forward: Counts
    backward: Counts
    saved_bytes: int  # beside x and parameters

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.backward.bytes

    def seconds(self, ceiling: tuple[float, float]) -> float:
        return self.forward.seconds(*ceiling) + self.backward.seconds(*ceiling)


def cost(name: str | None, tokens: int, d: int, k: int, dtype: torch.dtype, **fields) -> Cost:
    """The cost of method ``name`` (None: the frozen layer) over a bias-free layer [d, k]; ``fields`` of its config."""
    pattern = methods.even_pattern(d, k) if name == "rosa" else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        linear = nn.Linear(k, d, bias=False, dtype=dtype).requires_grad_(False)
        x = torch.empty(tokens, k, dtype=dtype, requires_grad=True)
        forward, parameters = (lambda x: F.linear(x, linear.weight)), []
        if name is not None:
            forward, parameters = methods.layer(name, linear, pattern, **fields)
        constants = [linear.weight, *parameters]
        if isinstance(forward, nn.Module):
            constants += [*forward.parameters(), *forward.buffers()]
        saved = saved_bytes(forward, x, constants)
        with counted() as ahead:
            y = forward(x)
        dy = torch.empty_like(y)
        with counted() as back:
            y.backward(dy)
    return Cost(sum(p.numel() for p in parameters), ahead, back, saved)
