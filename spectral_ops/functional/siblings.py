"""Low-rank layers that read one x (q, k, v; gate, up) but are called one by one (METHODS 1.1, siblings).

    [h_1 | h_2 | ...] = x [A_1; A_2; ...]ᵀ          the projection, once
    y_i = x W_iᵀ + γ_i h_i' B_iᵀ + b_i               each layer's own node: dx = dy W + u A, dB, db, dC, and u to h_i
    [dA_1; dA_2; ...] = [u_1 | u_2 | ...]ᵀ x        the projection's node, once all siblings' have run

A layer's node saves what LowRankFunction saves, in its order, and the projection's nothing: it is handed x by the
siblings during backward. So a checkpoint may recompute a layer either way, and backwards over parts of the siblings,
one after the other, find nothing freed.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from spectral_ops.core.autograd import apply, apply_op, backward_pass, rows, shaped, through
from spectral_ops.functional.lowrank import (
    A_gradient,
    apply_core,
    core_backward,
    fused_forward,
    input_gradient,
    lowrank_backward_op,
    plain,
)


def stacked_hidden(x, As):
    """h_i [T, r_i] of every A_i, as slices of one product."""
    stacked = torch.cat(As).to(x.dtype)
    return (rows(x) @ stacked.t()).split([A.shape[0] for A in As], 1)


class ProjectionFunction(Function):
    """``box`` carries x from the siblings' backwards to this one, by graph task: several may run at once."""

    @staticmethod
    def forward(ctx, x, box, *As):
        ctx.box, ctx.ranks, ctx.dtype = box, [A.shape[0] for A in As], As[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(stacked_hidden(x, As))

    @staticmethod
    @backward_pass
    def backward(ctx, *us):
        x = ctx.box.pop(torch._C._current_graph_task_id(), None)
        found = [i for i, u in enumerate(us) if u is not None and ctx.needs_input_grad[2 + i]]
        grads: list[torch.Tensor | None] = [None] * (2 + len(us))
        if found:
            dA = A_gradient(torch.cat([us[i] for i in found], 1), rows(x), None, 0.0, ctx.dtype)
            parts = dA.split([ctx.ranks[i] for i in found])
            for i, part in zip(found, parts, strict=True):  # copied: a gradient is its parameter's alone
                grads[2 + i] = part if len(found) == 1 else part.clone()
        return tuple(grads)

    @staticmethod
    def twice(ctx, *us):
        return (None,) * (2 + len(us))  # the siblings' own gave A its gradient


class SiblingFunction(Function):
    """Dense tier given h; saves what LowRankFunction saves."""

    @staticmethod
    def forward(ctx, x, weight, h, A, B, bias, core, scale, box):
        y = shaped(fused_forward(rows(x), weight, apply_core(h, core), B.to(x.dtype), scale, None, bias), x)
        _, _, _, need_A, need_B, _, need_core, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, weight, A, B, core, None, h if need_B or need_core else None, None)
        ctx.scale, ctx.box = scale, box
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        x, weight, A, B, core, _, h, _ = ctx.saved_tensors
        need_x, _, _, need_A, need_B, need_bias, need_core, *_ = ctx.needs_input_grad
        dy2 = rows(dy)
        need_u = need_x or need_A or need_core
        if h is None:
            h = dy2.new_empty(dy2.shape[0], A.shape[0])
        hc = apply_core(h, core) if need_B else h
        u, dB, db, _, _ = lowrank_backward_op(
            dy2, hc, B.to(dy.dtype), ctx.scale, None, None, None, need_u, need_B, need_bias, False
        )
        dx = dcore = None
        if need_u:
            u, dcore = core_backward(h, u, core, need_core)
        if need_x:
            dx = input_gradient(dy2, None, weight, None, u, A.to(dy.dtype), None, 0.0)
            dx = dx.reshape(*dy.shape[:-1], A.shape[1])
        if need_A:
            ctx.box[torch._C._current_graph_task_id()] = x
        return (
            dx, None, u if need_A else None, None, dB.to(B.dtype) if need_B else None,
            db.to(dy.dtype) if need_bias else None, dcore, None, None,
        )  # fmt: skip

    @staticmethod
    def twice(ctx, dy):
        x, weight, A, B, core, *_ = ctx.saved_tensors
        if x is None:
            raise RuntimeError("create_graph: got a second derivative where A is frozen, for which x is not kept")
        bias = x.new_zeros(weight.shape[0], requires_grad=ctx.needs_input_grad[5])
        unused = x.new_zeros((), requires_grad=True)  # A gets its gradient here, not by way of h
        y = plain(x, x, weight, A, B, None, core, ctx.scale)
        return through(ctx, y + bias, (x, weight, unused, A, B, bias, core), dy)


def project(x, As, box):
    """The siblings' projections h_i [T, r_i]; ``box`` is an empty dict that :func:`linear` gets as well."""
    if torch.is_grad_enabled():
        return apply(ProjectionFunction, x, x.detach(), box, *As)
    return apply_op(stacked_hidden, x, x, As)


def _given(x, weight, h, B, bias, core, scale):
    return shaped(fused_forward(rows(x), weight, apply_core(h, core), B.to(x.dtype), scale, None, bias), x)


def linear(x, weight, h, A, B, bias, core, scale, box):
    """y [..., d] of one sibling, from the h that :func:`project` made of the same x and A."""
    if torch.is_grad_enabled():
        return apply(SiblingFunction, x, x, weight, h, A, B, bias, core, scale, box)
    return apply_op(_given, x, x, weight, h, B, bias, core, scale)
