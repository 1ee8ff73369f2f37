"""The ``spectral_ops`` operator namespace and the one helper that defines an operator.

An operator is a schema, a reference in plain torch, a fake (shape) kernel and a cost formula, all given in
one place: its file in :mod:`spectral_ops.functional`.  Backends only *add* implementations to it:

* ``reference`` -- the plain torch function, on every device (dispatch key CompositeExplicitAutograd);
* ``cpu``/``cuda`` -- compiled by ``csrc/`` and registered by the extensions themselves on their dispatch key;
* ``triton``   -- the function of the same name in ``triton_kernels/<stem>.py``, imported on first use.

Besides ``torch.ops.spectral_ops.<name>`` every operator has the overloads ``.reference`` and ``.triton``, which run
exactly that implementation: that is what a forced backend calls, also under ``torch.compile``. The overload ``.tuned``
runs what measurement chose for the sizes of the call (see :mod:`spectral_ops.tuning`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import addmm_flop, flop_registry, register_flop_formula

NAMESPACE = "spectral_ops"
BACKENDS = ("reference", "cpu", "triton", "cuda")

library = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process; owns every registration
OPERATORS: dict[str, Operator] = {}
FUNCTIONS: dict[str, tuple[str, ...]] = {}  # public function -> the operators it may call; for backends.explain
# Set by backends.use_backend; process-wide, because autograd runs backward passes on threads of its own.
forced_backend: str | None = None
require: Callable[[Operator, str, tuple], None] | None = None  # backends.require: raises where that backend cannot run
tuned: Callable[[str, torch.device], bool] | None = None  # backends.tuned: whether a table has another choice for it
chosen: Callable[[Operator, tuple], Callable] | None = None  # backends.chosen: the implementation for these arguments


if torch.ops.aten.addmm_ not in flop_registry:  # torch counts addmm, but not the in-place form that the layers use
    register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one call: floating-point operations, and the least bytes that must cross memory."""

    flops: int
    bytes: int


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of every given tensor together; ``None`` counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype products are summed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operator:
    """One operator: calling it runs the implementation the dispatcher (or a forced backend) chooses."""

    def __init__(self, schema: str, stem: str, reference: Callable, fake: Callable, cost: Callable[..., Cost]):
        self.schema = schema
        self.name = schema.split("(", 1)[0]
        self.stem = stem
        self.reference = reference
        self.fake = fake
        self.cost = cost
        arguments = schema.split("(", 1)[1]
        library.define(schema)
        library.define(f"{self.name}.reference({arguments}")
        library.define(f"{self.name}.triton({arguments}")
        library.define(f"{self.name}.tuned({arguments}")
        packet = getattr(torch.ops.spectral_ops, self.name)
        self.default = packet.default
        self.overloads = {"reference": packet.reference, "triton": packet.triton}
        self.tuned = packet.tuned
        self.library: Callable | None = None  # the library's products for the same result, where those are the default
        for name in (self.name, f"{self.name}.reference"):
            library.impl(name, self._run_reference, "CompositeExplicitAutograd")
        library.impl(f"{self.name}.triton", self._run_triton, "CompositeExplicitAutograd")
        library.impl(f"{self.name}.tuned", self._run_tuned, "CompositeExplicitAutograd")
        for name in (self.name, *(f"{self.name}.{overload}" for overload in ("reference", "triton", "tuned"))):
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: cost(*args).flops)
        self._triton: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if forced_backend is None:
            return (self.tuned if tuned(self.name, args[0].device) else self.default)(*args)
        require(self, forced_backend, args)
        return self.overloads.get(forced_backend, self.default)(*args)

    def triton_function(self) -> Callable:
        """The launcher in ``triton_kernels/<stem>.py``; imports triton on first use."""
        if self._triton is None:
            from spectral_ops import triton_kernels

            self._triton = triton_kernels.launcher(self.stem, self.name)
        return self._triton

    def _run_reference(self, *args: Any) -> Any:
        device_type = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device_type):
            return self.reference(*args)
        with torch.autocast(device_type, enabled=False):  # else autocast would round its float32 products
            return self.reference(*args)

    def _run_triton(self, *args: Any) -> Any:
        return self.triton_function()(*args)

    def _run_tuned(self, *args: Any) -> Any:
        return chosen(self, args)(*args)

    def __repr__(self) -> str:
        return f"<operator {NAMESPACE}::{self.schema}>"


def define(schema: str, *, stem: str, fake: Callable, cost: Callable[..., Cost]) -> Callable[[Callable], Operator]:
    """Decorate the reference implementation of an operator; the decorated name becomes the :class:`Operator`.

    ``fake`` takes the operator's arguments and returns empty outputs of the right shape and dtype; ``cost`` takes the
    same arguments (real or meta tensors) and returns a :class:`Cost`.
    """

    def decorate(reference: Callable) -> Operator:
        operator = Operator(schema, stem, reference, fake, cost)
        OPERATORS[operator.name] = operator
        return operator

    return decorate


def schema_hash() -> str:
    """Hash over every schema; a compiled extension carries the one it was built for, and the loader compares them."""
    return hashlib.sha256("\n".join(sorted(op.schema for op in OPERATORS.values())).encode()).hexdigest()[:16]
