"""Which implementation of an operator runs, how to force one, and how to ask."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spectral_ops import _library, _loader
from spectral_ops._library import BACKENDS, Operator


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot run here; the message says what is missing and the command that mends it."""


@dataclass(frozen=True)
class Choice:
    """What :func:`explain` returns: the backend that would run, and why."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


def triton_missing() -> str | None:
    """Why Triton cannot be imported here, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def unavailable(operator: Operator, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device_type``; None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        from spectral_ops import triton_kernels

        if operator.name not in triton_kernels.OPERATORS:
            return f"{operator.name} has no Triton kernel"
        if missing := triton_missing():
            return missing
        if device_type == "cpu" and not interpreting():
            return "Triton runs on a GPU; on the CPU only its interpreter does (set TRITON_INTERPRET=1 before starting)"
        return None
    if backend != device_type:
        return f"the {backend} backend runs on {backend} tensors, these are on {device_type}"
    module = _loader.EXTENSIONS[backend]
    if module.error:
        return module.error
    if operator.name not in module.operators:
        return f"{operator.name} has no compiled {backend} kernel"
    return None


def require(operator: Operator, backend: str, args: tuple) -> None:
    """Raise BackendUnavailable unless ``backend`` can run ``operator`` on the device of its first tensor."""
    device_type = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    if reason := unavailable(operator, backend, device_type):
        raise BackendUnavailable(f"backend {backend!r} was forced, but cannot run {operator.name}: {reason}")


_library.require = require


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator to run on one backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Process-wide, backward threads included: keep the backward pass inside the ``with`` block. An operator that cannot
    run there raises :class:`BackendUnavailable`. ``SPECTRAL_OPS_BACKEND`` in the environment does the same from start.
    """
    previous = _library.forced_backend
    _force(name)
    try:
        yield
    finally:
        _library.forced_backend = previous


def _force(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    _library.forced_backend = name


def choose(operator: Operator, device_type: str) -> Choice:
    """Which backend runs ``operator`` on tensors of ``device_type`` at this moment."""
    if _library.forced_backend is not None:
        backend = _library.forced_backend
        reason = unavailable(operator, backend, device_type)
        return Choice(operator.name, backend, f"forced, but it would raise: {reason}" if reason else "forced")
    why_not = []
    for backend in ("cpu",) if device_type == "cpu" else ("cuda", "triton"):
        reason = unavailable(operator, backend, device_type)
        if reason is None:
            return Choice(operator.name, backend, f"fastest available on {device_type}")
        why_not.append(f"{backend}: {reason}")
    return Choice(operator.name, "reference", "; ".join(why_not))


def explain(op: str | Operator, *tensors: torch.Tensor) -> Choice:
    """Which implementation would run on ``tensors``, and why.

    ``op`` names an operator (``"block_tile_"``) or a public function (``"dora_linear"``), whose choice lists the
    backend of every operator it may call besides the library's plain products. Raises ValueError for another name.
    """
    names = [op.name] if isinstance(op, Operator) else [op] if op in _library.OPERATORS else _library.FUNCTIONS.get(op)
    if names is None:
        known = ", ".join(sorted({*_library.OPERATORS, *_library.FUNCTIONS}))
        raise ValueError(f"op: got {op!r}, wanted one of {known}")
    devices = {t.device.type for t in tensors} or {"cpu"}
    if len(devices) > 1:
        raise ValueError(f"tensors: got tensors on {', '.join(sorted(devices))}, wanted one device")
    device = devices.pop()
    choices = [choose(_library.OPERATORS[name], device) for name in names]
    if not isinstance(op, str) or op in _library.OPERATORS:
        return choices[0]
    return Choice(op, ", ".join(dict.fromkeys(c.backend for c in choices)), "; ".join(map(str, choices)))


def activate() -> None:
    """Give every operator without a compiled CUDA kernel its Triton one there, and honour SPECTRAL_OPS_BACKEND."""
    from spectral_ops import triton_kernels

    compiled = _loader.EXTENSIONS["cuda"].operators
    if triton_missing() is None:
        for operator in _library.OPERATORS.values():
            if operator.name in triton_kernels.OPERATORS and operator.name not in compiled:
                _library.library.impl(operator.name, operator._run_triton, "CUDA")
    if name := os.environ.get("SPECTRAL_OPS_BACKEND"):
        _force(name)
