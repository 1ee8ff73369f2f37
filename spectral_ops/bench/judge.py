"""Whether a result is right: its relative error, and the one allowed. What is wrong is RED, and has no time."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from spectral_ops import _library

# Relative errors ‖out - ref‖ / ‖ref‖ that are allowed, by dtype.
# An operator on check's sizes, beside its reference in float64: a few roundings.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# A layer's output and gradients, beside the formula in a wider dtype.
LAYER = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A model's loss and gradients, beside the peer's. In bfloat16 PEFT's own are 3e-2 from float64's after two blocks.
STEP = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


def wrong(error: float | None, bound: float) -> bool:
    """Whether an error is beyond its bound; None: nothing was compared."""
    return error is not None and not error <= bound


def converted(args: tuple, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> tuple:
    """A copy of ``args``, laid out alike, with floating tensors in ``dtype``, on ``device``; None: as they are."""

    def one(a):
        to = {"dtype": dtype if dtype and a.is_floating_point() else a.dtype, "device": device or a.device}
        if any(step == 0 for step in a.stride()):  # several elements share memory
            return a.to(**to, copy=True)
        return torch.empty_strided(a.shape, a.stride(), **to).copy_(a)

    return tree_map_only(torch.Tensor, one, args)


def outputs(operator: _library.Operator, call, args: tuple) -> list[torch.Tensor]:
    """What a call computes: its results and its mutated arguments."""
    results = call(*args)
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in operator.default._schema.arguments]
    written = tree_leaves([a for a, m in zip(args, mutated, strict=True) if m])
    return [t for t in tree_leaves(results) if t is not None] + [t for t in written if t.is_floating_point()]


def relative_error(operator: _library.Operator, args: tuple, device: str | None = None) -> float:
    """Largest ‖out - ref‖ / ‖ref‖ over the outputs, ref being the reference in float64 on the same (rounded) inputs.

    device: where the reference runs; None: where the arguments are.
    """
    exact = outputs(operator, operator.reference, converted(args, torch.float64, device))
    return largest_error(outputs(operator, operator, converted(args)), exact)


def largest_error(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest ‖got - exact‖ / ‖exact‖ of several tensors; infinite for another shape or a NaN."""
    worst = 0.0
    for g, e in zip(got, exact, strict=True):
        if g.shape != e.shape:
            return float("inf")
        error = (g.to(e.device).double() - e.double()).norm() / e.double().norm().clamp_min(1e-300)
        worst = max(worst, float(error) if error == error else float("inf"))
    return worst
