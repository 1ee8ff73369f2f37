"""The ``spectral_ops`` operator namespace and the one helper that defines an operator.

An operator is a schema, a reference in plain torch, a fake (shape) kernel, a cost formula and sample arguments, all
given in one place: its file in :mod:`spectral_ops.functional`, whose name is the operator's *stem*. Nothing else lists
it. Backends only *add* implementations:

* ``reference`` -- the plain torch function, on every device (dispatch key CompositeExplicitAutograd);
* ``cpu``/``cuda`` -- compiled by ``csrc/`` and registered by the extensions themselves on their dispatch key;
* ``triton``   -- the function of the same name in ``triton_kernels/<stem>.py``, imported on first use.

Besides ``torch.ops.spectral_ops.<name>`` every operator has the overloads ``.reference`` and ``.triton``, which run
exactly that implementation: that is what a forced backend calls, also under ``torch.compile``. The overload ``.tuned``
runs what measurement chose for the sizes of the call (see :mod:`spectral_ops.tuning`).

A *layer operator* is a whole layer, forward or backward, in one call. Its Python function composes it of operators and
library products; a compiled extension does the same inside one kernel call, so that the host pays for one dispatch and
no dispatch mode sees a tensor that is overwritten. Its overloads compose it of pieces of that backend.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from spectral_ops._imports import Finder

NAMESPACE = "spectral_ops"
FLOP_COUNTER = "torch.utils.flop_counter"
BACKENDS = ("reference", "cpu", "triton", "cuda")

library = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process; owns every registration
OPERATORS: dict[str, Operator] = {}
LAYERS: dict[str, LayerOperator] = {}
FUNCTIONS: dict[str, tuple[str, ...]] = {}  # public function -> the operators it may call, as ``calls`` says
PRODUCTS: dict[str, Callable] = {}  # public function -> its products of several routes: name, operator, arguments
# Set by backends.use_backend; process-wide, because autograd runs backward passes on threads of its own.
forced_backend: str | None = None
_composing = threading.local()  # .backend: what a layer operator composed in this thread takes its pieces from
backends: ModuleType | None = None  # spectral_ops.backends, which puts itself here: this module imports none of it


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one call: floating-point operations, and the least bytes that must cross memory."""

    flops: int
    bytes: int


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of every given tensor together; ``None`` counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device; torch raises for one that has none (meta)."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype products are summed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def measured(name: str, device: torch.device) -> bool:
    """Whether a table of measured choices has another than the default for an operator; asked only where one exists."""
    return backends.tables and backends.tuned(name, device)


def composing() -> str | None:
    """The backend whose pieces a layer operator is being composed of in this thread, if of one."""
    return getattr(_composing, "backend", None)


class Operator:
    """One operator: calling it runs the implementation the dispatcher (or a forced backend) chooses."""

    def __init__(
        self,
        schema: str,
        reference: Callable,
        fake: Callable,
        cost: Callable[..., Cost],
        samples: Callable[[Any], Iterator[tuple]],
    ):
        self.schema = schema
        self.name = schema.split("(", 1)[0]
        self.stem = reference.__module__.rpartition(".")[2]
        self.reference = reference
        self.fake = fake
        self.cost = cost
        self.samples = samples
        arguments = schema.split("(", 1)[1]
        library.define(schema)
        library.define(f"{self.name}.reference({arguments}")
        library.define(f"{self.name}.triton({arguments}")
        library.define(f"{self.name}.tuned({arguments}")
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self.default = packet.default
        self.overloads = {"reference": packet.reference, "triton": packet.triton}
        self.tuned = packet.tuned
        self.library: Callable | None = None  # the library's products for the same result, where those are the default
        self.routes: Callable | None = None  # what ``explain`` says of the way that the compiled operator takes
        self.mutated = [
            i for i, a in enumerate(self.default._schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        library.impl(self.name, self._run_default, "CompositeExplicitAutograd")
        library.impl(f"{self.name}.reference", self._run_reference, "CompositeExplicitAutograd")
        library.impl(f"{self.name}.triton", self._run_triton, "CompositeExplicitAutograd")
        library.impl(f"{self.name}.tuned", self._run_tuned, "CompositeExplicitAutograd")
        for name in (self.name, *(f"{self.name}.{overload}" for overload in ("reference", "triton", "tuned"))):
            library.impl(name, fake, "Meta")  # register_fake does this and reads our source, a third of the import
        if FLOP_COUNTER in sys.modules:
            self.enter_formula()
        self._triton: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        backend = composing() or forced_backend
        if backend is None:
            return (self.tuned if measured(self.name, args[0].device) else self.default)(*args)
        backends.require(self, backend, args)
        return self.overloads.get(backend, self.default)(*args)

    def flops(self, *args: Any) -> int:
        return self.cost(*args).flops

    def enter_formula(self) -> None:
        """Let torch's flop counter count this operator by its formula."""
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(self.default.overloadpacket, get_raw=True)(lambda *args, out_val=None: self.flops(*args))

    def triton_function(self) -> Callable:
        """The launcher in ``triton_kernels/<stem>.py``; imports triton on first use."""
        if self._triton is None:
            self._triton = backends.launcher(self.stem, self.name)
        return self._triton

    def _run_default(self, *args: Any) -> Any:  # where no extension has the operator
        return self._run_reference(*args)

    def _run_reference(self, *args: Any) -> Any:
        device_type = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not autocast_enabled(device_type):
            return self.reference(*args)
        with torch.autocast(device_type, enabled=False):  # else autocast would round its float32 products
            return self.reference(*args)

    def _run_triton(self, *args: Any) -> Any:
        out = self.triton_function()(*args)
        if self.mutated:  # the kernels write past torch
            written = tree_leaves([args[i] for i in self.mutated])
            torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
        return out

    def _run_tuned(self, *args: Any) -> Any:
        return backends.chosen(self, args)(*args)

    def __repr__(self) -> str:
        return f"<operator {NAMESPACE}::{self.schema}>"


class LayerOperator(Operator):
    """A whole layer's forward or backward; ``reference`` composes it of ``pieces`` (operators) and library products."""

    def __init__(self, schema: str, composition: Callable, fake: Callable, pieces: tuple[str, ...]):
        self.pieces = pieces
        super().__init__(schema, composition, fake, cost=None, samples=None)
        self._direct = self.default._op  # the same past a Python frame, which torch.compile would need to see
        if "Tensor[]" in schema:  # torch's own rules for batches of calls, which are loops, take no lists of tensors
            for overload in (self.default, *self.overloads.values(), self.tuned):
                name = overload.name().removeprefix(f"{NAMESPACE}::")
                library.impl(name, functools.partial(_each_gradient, overload), "Batched")
                torch.library.register_vmap(overload, functools.partial(_each_mapped, overload), lib=library)

    def __call__(self, *args: Any) -> Any:
        if forced_backend is not None:
            backends.require(self, forced_backend, args)
            return self.overloads.get(forced_backend, self.default)(*args)
        if measured(self.name, args[0].device):
            return self.tuned(*args)
        return self.default(*args) if torch.compiler.is_compiling() else self._direct(*args)

    def flops(self, *args: Any) -> int:
        """Those of its pieces and products, counted on tensors without memory."""
        from torch.utils.flop_counter import FlopCounterMode

        with _disable_current_modes(), FlopCounterMode(display=False) as counter:
            self._compose(None, tree_map_only(torch.Tensor, _without_memory, args))
        return counter.get_total_flops()

    def _compose(self, backend: str | None, args: tuple) -> Any:
        previous = composing()
        _composing.backend = backend
        try:
            with torch.no_grad():
                return super()._run_reference(*args)
        finally:
            _composing.backend = previous

    def _run_reference(self, *args: Any) -> Any:
        return self._compose("reference", args)

    def _run_default(self, *args: Any) -> Any:
        return self._compose(None, args)

    def _run_triton(self, *args: Any) -> Any:
        return self._compose("triton", args)

    def _run_tuned(self, *args: Any) -> Any:
        return self._compose(None, args)


def _each(run: Callable, args: tuple, dims: list[int | None]) -> Any:
    """``run`` on every slice of a batch in turn; ``dims``: where each leaf of ``args`` has the batch, if it does."""
    leaves, structure = tree_flatten(args)
    slices = [itertools.repeat(t) if dim is None else t.unbind(dim) for t, dim in zip(leaves, dims, strict=True)]
    results = [run(*tree_unflatten(one, structure)) for one in zip(*slices, strict=False)]
    return tree_map(lambda *ts: torch.stack(ts), *results)


def _each_mapped(run: Callable, info: Any, dims: tuple, *args: Any) -> tuple:
    """The rule of torch.vmap."""
    results = _each(run, args, tree_leaves(dims))
    return results, tree_map(lambda t: 0, results)


def _each_gradient(run: Callable, *args: Any) -> Any:
    """The rule of ``is_grads_batched``, which has batches of its own kind."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    leaves, structure = tree_flatten(args)
    batched = [isinstance(t, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(t) for t in leaves]
    leaves = [torch._remove_batch_dim(t, level, 1, 0) if b else t for t, b in zip(leaves, batched, strict=True)]
    results = _each(run, tree_unflatten(leaves, structure), [0 if b else None for b in batched])
    return tree_map(lambda t: torch._add_batch_dim(t, 0, level), results)


def _without_memory(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def define_layer(schema: str, *, fake: Callable, pieces: tuple[str, ...]) -> Callable[[Callable], LayerOperator]:
    """Decorate the Python composition of a layer operator; the decorated name becomes the :class:`LayerOperator`."""

    def decorate(composition: Callable) -> LayerOperator:
        operator = LayerOperator(schema, composition, fake, pieces)
        LAYERS[operator.name] = operator
        return operator

    return decorate


def define(
    schema: str, *, fake: Callable, cost: Callable[..., Cost], samples: Callable[[Any], Iterator[tuple]]
) -> Callable[[Callable], Operator]:
    """Decorate the reference implementation of an operator; the decorated name becomes the :class:`Operator`.

    ``fake`` takes the operator's arguments and returns empty outputs of the right shape and dtype. ``cost`` takes the
    same arguments (real or meta tensors) and returns a :class:`Cost`. ``samples`` takes a
    :class:`spectral_ops.bench.samples.Samples` and yields argument tuples that show every option on and off, the one
    to benchmark first: ``check``, the tuner, the benchmarks and the tests run on them.
    """

    def decorate(reference: Callable) -> Operator:
        operator = Operator(schema, reference, fake, cost, samples)
        OPERATORS[operator.name] = operator
        return operator

    return decorate


def calls(*operators: Operator) -> Callable[[Callable], Callable]:
    """Decorate a public function with the operators it may call besides the library's products, for ``explain``."""

    def decorate(function: Callable) -> Callable:
        FUNCTIONS[function.__name__] = tuple(operator.name for operator in operators)
        return function

    return decorate


def enter_formulas() -> None:
    """Let torch's flop counter count every operator that there is."""
    from torch.utils.flop_counter import addmm_flop, flop_registry, register_flop_formula

    if torch.ops.aten.addmm_ not in flop_registry:  # torch counts addmm, but not the in-place form that layers use
        register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)
    for operator in (*OPERATORS.values(), *LAYERS.values()):
        operator.enter_formula()


# The counter imports triton where that is installed, which takes longer than all of this package: so it is waited for.
if FLOP_COUNTER in sys.modules:
    enter_formulas()
else:
    sys.meta_path.insert(0, Finder(FLOP_COUNTER, enter_formulas))


def schema_hash() -> str:
    """Hash over every schema; a compiled extension carries the one it was built for, and the loader compares them."""
    schemas = sorted(op.schema for op in (*OPERATORS.values(), *LAYERS.values()))
    return hashlib.sha256("\n".join(schemas).encode()).hexdigest()[:16]
