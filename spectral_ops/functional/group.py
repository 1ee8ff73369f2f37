"""Several low-rank linear layers over one x: q, k and v, or gate and up (METHODS 1.1, siblings).

Their projections are one product over the stacked A, which reads x once; so is dA, and the share of dx that comes
through the adapters. Saved for backward: x and the stacked h [T, Σr].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    rows,
    shaped,
    through,
    wanted,
)
from spectral_ops.functional.lowrank import A_gradient, fused, fused_forward, lowrank_backward_op, lowrank_matmul_op

__all__ = ["lowrank_linear_group"]


# --- layers ----------------------------------------------------------------------------------------------------------

_SIBLINGS = "Tensor[] weights, Tensor[] A, Tensor[] B"


@define_layer(
    f"lowrank_group_forward(Tensor x, {_SIBLINGS}, Tensor?[] biases, float[] scales) -> (Tensor[], Tensor)",
    fake=lambda x, weights, A, B, biases, scales: (
        [x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights],
        x.new_empty(math.prod(x.shape[:-1]), sum(a.shape[0] for a in A)),
    ),
    pieces=("lowrank_matmul",),
)
def lowrank_group_forward_op(x, weights, A, B, biases, scales):
    """y_i [..., d_i] of every sibling, and their h [T, Σr_i] side by side."""
    x2 = rows(x)
    h = x2 @ torch.cat([a.to(x.dtype) for a in A]).t()
    parts = h.split([a.shape[0] for a in A], 1)
    outputs = [
        shaped(fused_forward(x2, W, part, b.to(x.dtype), scale, None, bias), x)
        for W, part, b, bias, scale in zip(weights, parts, B, biases, scales, strict=True)
    ]
    return outputs, h


def _lead(dys):
    return next(dy.shape[:-1] for dy in dys if dy is not None)


def _group_backward_fake(h, x, dys, weights, A, B, scales, needs):
    dx = h.new_empty((*_lead(dys), A[0].shape[1]) if any(need & 1 for need in needs) else (0,))
    each = [wanted(h, need >> 1, a, b, W.shape[:1]) for need, a, b, W in zip(needs, A, B, weights, strict=True)]
    return dx, *map(list, zip(*each, strict=True))


@define_layer(
    f"lowrank_group_backward(Tensor h, Tensor? x, Tensor?[] dys, {_SIBLINGS}, float[] scales,"
    " int[] needs) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    fake=_group_backward_fake,
    pieces=("lowrank_matmul", "lowrank_backward"),
)
def lowrank_group_backward_op(h, x, dys, weights, A, B, scales, needs):
    """dx [..., k], summed over the siblings, and every dA_i, dB_i and db_i in the parameters' dtypes.

    ``needs[i]`` is a mask of what sibling i, which then has a dy, contributes to: dx, dA_i, dB_i, db_i from the lowest
    bit on. A gradient nobody wants is empty [0].
    """
    ranks = [a.shape[0] for a in A]
    dx, us = None, {}
    dA, dB, db = ([h.new_empty(0) for _ in A] for _ in range(3))
    for i, part in enumerate(h.split(ranks, 1)):
        need_x, need_A, need_B, need_bias = (bool(needs[i] >> bit & 1) for bit in range(4))
        if not needs[i]:
            continue
        dy2 = rows(dys[i])
        u, full_B, full_b, _, _ = lowrank_backward_op(
            dy2, part, B[i].to(h.dtype), scales[i], None, None, None, need_x or need_A, need_B, need_bias, False
        )
        if need_x or need_A:
            us[i] = u
        if need_B:
            dB[i] = full_B.to(B[i].dtype)
        if need_bias:
            db[i] = full_b.to(h.dtype)
    lifted, trained = ([i for i in us if needs[i] >> bit & 1] for bit in (0, 1))
    if lifted:
        first, *others = lifted
        u, a = torch.cat([us[i] for i in lifted], 1), torch.cat([A[i].to(h.dtype) for i in lifted])
        joins = fused(lowrank_matmul_op, h.device)
        dy2 = rows(dys[first])
        dx = lowrank_matmul_op(dy2, weights[first].t(), u, a.t(), 1.0, None, None) if joins else dy2 @ weights[first]
        for i in others:
            dx.addmm_(rows(dys[i]), weights[i])
        dx = dx if joins else dx.addmm_(u, a)
    if trained:
        stacked = A_gradient(torch.cat([us[i] for i in trained], 1), rows(x), None, 0.0, accumulate_dtype(h.dtype))
        for i, part in zip(trained, stacked.split([ranks[i] for i in trained]), strict=True):
            dA[i] = part.to(A[i].dtype, copy=True)
    return h.new_empty(0) if dx is None else dx.reshape(*_lead(dys), dx.shape[1]), dA, dB, db


# --- autograd --------------------------------------------------------------------------------------------------------


class LowRankGroupFunction(Function):
    """Siblings that read one x; saves x and the stacked h. One whose output nobody used costs nothing in backward."""

    @staticmethod
    def forward(ctx, x, scales, *layers):
        weights, As, Bs, biases = layers[0::4], layers[1::4], layers[2::4], layers[3::4]
        outputs, h = lowrank_group_forward_op(x, weights, As, Bs, biases, scales)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3::4]) else None, h, *weights, *As, *Bs)
        ctx.scales = scales
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @backward_pass
    def backward(ctx, *dys):
        x, h, *rest = ctx.saved_tensors
        n = len(dys)
        need_x, need_layers = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        used = [i for i, dy in enumerate(dys) if dy is not None]
        needs = [0] * n
        for i in used:
            _, need_A, need_B, need_bias = need_layers[4 * i : 4 * i + 4]
            needs[i] = need_x | need_A << 1 | need_B << 2 | need_bias << 3
        dx, dAs, dBs, dbs = lowrank_group_backward_op(
            h, x, dys, rest[:n], rest[n : 2 * n], rest[2 * n :], ctx.scales, needs
        )
        grads: list[torch.Tensor | None] = [None] * (2 + 4 * n)
        grads[0] = dx if need_x and used else None
        for i in used:
            for place, (bit, parts) in enumerate(((1, dAs), (2, dBs), (3, dbs)), 3 + 4 * i):
                grads[place] = parts[i] if needs[i] >> bit & 1 else None
        return tuple(grads)

    @staticmethod
    def twice(ctx, *dys):
        x, _, *rest = ctx.saved_tensors
        if x is None:
            raise RuntimeError("create_graph: got a second derivative where every A is frozen, for which x is not kept")
        n = len(dys)
        ys, inputs = [], [x, None]
        for i, scale in enumerate(ctx.scales):
            weight, A, B = rest[i::n]
            bias = x.new_zeros(weight.shape[0], requires_grad=ctx.needs_input_grad[5 + 4 * i])
            h = x @ A.to(x.dtype).t()
            ys.append(x @ weight.t() + scale * (h @ B.to(x.dtype).t()) + bias)
            inputs += [weight, A, B, bias]
        used = [i for i, dy in enumerate(dys) if dy is not None]
        return through(ctx, [ys[i] for i in used], inputs, [dys[i] for i in used])


# --- public function -------------------------------------------------------------------------------------------------


@calls(lowrank_group_forward_op, lowrank_group_backward_op)
def lowrank_linear_group(x, layers: Sequence[tuple]):
    """Several low-rank linear layers over one x (q, k, v; gate, up): their projections share one read of x.

    ``layers`` is a sequence of (weight [d, k], lora_A [r, k], lora_B [d, r], bias [d] or None, scale); sizes and ranks
    may differ. Returns the list of outputs [..., d]. Saves x and the stacked h [T, Σr]. METHODS 1.1, siblings.
    """
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: got {type(layers).__name__} of no layers, wanted a non-empty sequence")
    checks.tensor("x", x, "[..., in_features]")
    flat, scales = [], []
    for i, layer in enumerate(layers):
        if not isinstance(layer, (tuple, list)) or len(layer) != 5:
            got = f"{len(layer)} entries" if isinstance(layer, (tuple, list)) else type(layer).__name__
            raise ValueError(f"layers[{i}]: got {got}, wanted (weight, lora_A, lora_B, bias, scale)")
        weight, A, B, bias, scale = layer
        x, weight, bias = autocast_arguments(x, weight, bias)  # x is cast once: the next time it is already
        try:
            checks.linear(x, weight, bias)
            checks.same_dtype("x", x, weight=weight, bias=bias)
            checks.low_rank(x, weight.shape[0], A, B)
            checks.number("scale", scale)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{i}]: {error}") from None
        flat += [weight, A, B, bias]
        scales.append(float(scale))
    if torch.is_grad_enabled():
        return list(apply(LowRankGroupFunction, x, x, scales, *flat))
    siblings = flat[0::4], flat[1::4], flat[2::4], flat[3::4]
    return apply_op(lowrank_group_forward_op, x, x, *siblings, scales)[0]
