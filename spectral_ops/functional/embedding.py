"""Low-rank update of an embedding: LoRA and DoRA over a lookup (METHODS 1.15).

    h  = Aᵀ[ids]   [T, r]           A [r, V], B [d, r]: B A is never formed
    y  = g * (out + γ h Bᵀ)         out = E[ids], somebody else's lookup; g absent, or DoRA's m / c
    backward, with G = g * dy:
      u = γ G B     dB = γ Gᵀ h     dA = the rows of u, each added at its id; dense, because optimizers take no other
      dm = Σ dy * z / c,  z = E[ids] + γ h Bᵀ, looked up again

The update and the pass over dy are the low-rank row's operators; gathering and scattering [T, r] rows are the library's
and need no kernel of their own. Saved for backward: the ids alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, backward_pass, contiguous_copy, fresh, overwritable, rows, tokens, wanted
from spectral_ops.functional.lowrank import lowrank_backward_op, lowrank_update_op

__all__ = ["embedding_update"]


def _gather(A: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """h [T, r] = Aᵀ[ids]."""
    return A.index_select(1, ids.reshape(-1)).t().to(dtype, memory_format=torch.contiguous_format)


def _scatter(u: torch.Tensor, ids: torch.Tensor, like: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """dA [r, V], in like's dtype: rows of u [T, r] added at their ids, in at least float32; none at ``padding_idx``."""
    ids, dA = ids.reshape(-1), like.new_zeros(like.shape)
    if padding_idx is not None:
        u = u.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    acc = accumulate_dtype(like.dtype)
    if like.dtype == acc:
        dA.t().index_put_((ids,), u.to(acc), accumulate=True)
        return dA
    ids, order = ids.sort(stable=True)  # sums of the ids that are there, so that no [r, V] is wider than the gradient
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    place = first.cumsum(0) - 1
    sums = u.new_zeros(u.shape, dtype=acc).index_put_((place,), u[order].to(acc), accumulate=True)
    dA.t().index_put_((ids,), sums[place].to(like.dtype))
    return dA


# --- layers ----------------------------------------------------------------------------------------------------------

_ARGUMENTS = "Tensor ids, Tensor A, Tensor B, Tensor? magnitude, Tensor? norm, float scale"


def _gains_fake(out, norm):
    return out.new_empty(0) if norm is None else norm.new_empty(2 * norm.shape[0])


@define_layer(
    f"embedding_update_forward_(Tensor(a!) out, {_ARGUMENTS}) -> Tensor",
    fake=lambda out, ids, A, B, magnitude, norm, scale: _gains_fake(out, norm),
    pieces=("lowrank_update_",),
)
def embedding_update_forward_op(out, ids, A, B, magnitude, norm, scale):
    """out [..., d] becomes out + γ h Bᵀ or, with a magnitude [d], g * (out + γ h Bᵀ). Returns gains [2 d], g followed
    by c (empty without a magnitude). ids [...]; A [r, V], B [d, r] in any dtype; norm [d] in the dtype of sums."""
    out, h, b = tokens(out), _gather(A, ids, out.dtype), B.to(out.dtype)
    if magnitude is None:
        out.addmm_(h, b.t(), alpha=scale)
        return out.new_empty(0)
    g = magnitude.to(norm.dtype) / norm
    lowrank_update_op(out, h, b, scale, g, None)
    return torch.cat((g, norm))


@define_layer(
    f"embedding_update_forward(Tensor base_out, {_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda base_out, ids, A, B, magnitude, norm, scale: (
        base_out.new_empty(base_out.shape), _gains_fake(base_out, norm),
    ),
    pieces=("lowrank_update_",),
)  # fmt: skip
def embedding_update_forward_copy_op(base_out, *args):
    """y and gains: what :func:`embedding_update_forward_op` makes of a copy of base_out [..., d]."""
    y = contiguous_copy(base_out)
    return y, embedding_update_forward_op.reference(y, *args)


@define_layer(
    "embedding_update_backward(Tensor dy, Tensor ids, Tensor? weight, Tensor? factor, Tensor A, Tensor B,"
    " Tensor? magnitude, Tensor? gains, float scale, int? padding_idx, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, ids, weight, factor, A, B, magnitude, gains, scale, padding_idx, needs: wanted(
        dy, needs, A, B, magnitude, dy.shape
    ),
    pieces=("lowrank_update_", "lowrank_backward"),
)
def embedding_update_backward_op(dy, ids, weight, factor, A, B, magnitude, gains, scale, padding_idx, needs):
    """dA [r, V], dB, dm and dout = g * dy; empty [0] where ``needs`` has no bit. weight [V, d] is read for dm alone:
    there base_out was weight[ids], times ``factor`` where that is given."""
    need_A, need_B, need_m, need_out = (bool(needs >> bit & 1) for bit in range(4))
    dy2, b, h, z = rows(dy), B.to(dy.dtype), dy.new_empty(ids.numel(), A.shape[0]), None
    g, norm = (None, None) if magnitude is None else gains.chunk(2)
    if need_B or need_m:
        h = _gather(A, ids, dy.dtype)
    if need_m:
        z = F.embedding(ids.reshape(-1), weight)
        z = (z if factor is None else z * factor.to(z.dtype)).to(dy.dtype)
        z.addmm_(h, b.t(), alpha=scale)
    u, dB, _, dyz, gdy = lowrank_backward_op(dy2, h, b, scale, g, z, None, need_A, need_B, False, need_out)
    dA = dm = dout = dy
    if need_A:
        dA = _scatter(u, ids, A, padding_idx)
    if need_m:
        dm = (dyz / norm).to(magnitude.dtype)
    if need_out:
        dout = gdy.reshape(dy.shape)
    return fresh(dy, needs, dA, dB.to(B.dtype), dm, dout)


# --- autograd --------------------------------------------------------------------------------------------------------


class EmbeddingUpdateFunction(Function):
    """In place on ``base_out`` or on a copy; saves the ids."""

    @staticmethod
    def forward(ctx, base_out, ids, weight, factor, A, B, magnitude, norm, scale, padding_idx, inplace):
        args = ids, A, B, magnitude, norm, scale
        if inplace:
            y, gains = base_out, embedding_update_forward_op(base_out, *args)
            ctx.mark_dirty(base_out)
        else:
            y, gains = embedding_update_forward_copy_op(base_out, *args)
        trained = ctx.needs_input_grad[6]
        ctx.save_for_backward(
            ids, weight if trained else None, factor if trained else None, A, B, magnitude,
            None if magnitude is None else gains,
        )  # fmt: skip
        ctx.scale, ctx.padding_idx = scale, padding_idx
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        ids, weight, factor, A, B, magnitude, gains = ctx.saved_tensors
        out, _, _, _, need_A, need_B, need_m, *_ = ctx.needs_input_grad
        scaled = out and magnitude is not None
        needs = need_A | need_B << 1 | need_m << 2 | scaled << 3
        dA, dB, dm, dout = embedding_update_backward_op(
            dy, ids, weight, factor, A, B, magnitude, gains, ctx.scale, ctx.padding_idx, needs
        )
        return (
            (dout if scaled else dy) if out else None, None, None, None, dA if need_A else None,
            dB if need_B else None, dm if need_m else None, None, None, None, None,
        )  # fmt: skip


def update(base_out, ids, A, B, scale, padding_idx=None, magnitude=None, norm=None, weight=None, factor=None):
    """:func:`embedding_update` past its checks."""
    inplace = overwritable(base_out)
    return apply(
        EmbeddingUpdateFunction, base_out, base_out, ids, weight, factor, A, B, magnitude, norm, scale, padding_idx,
        inplace,
    )  # fmt: skip


# --- public functions ------------------------------------------------------------------------------------------------


@calls(embedding_update_forward_op, embedding_update_forward_copy_op, embedding_update_backward_op)
def embedding_update(
    base_out, ids, lora_A, lora_B, *, scale=1.0, padding_idx=None, magnitude=None, norm=None, weight=None, factor=None
):
    """An embedding's low-rank update over its lookup: base_out [..., d] becomes base_out + scale (Aᵀ[ids]) Bᵀ.

    Args:
        base_out: a fresh result of the frozen lookup, which is overwritten and returned (a view or a trained leaf is
            copied first); ids [...] int64 or int32, each below V: torch raises for others on a CPU, as for E itself.
        lora_A: [r, V]; lora_B: [d, r]. May be float32 over a narrower base_out; gradients come back in their dtype,
            A's dense, with zeros at the ids that are not there and at ``padding_idx``.
        scale: γ.
        magnitude: m [d] makes it DoRA: base_out becomes m / c * (base_out + scale (Aᵀ[ids]) Bᵀ); then norm c [d] is
            column_norm of weight.t(), and weight E [V, d] is read for m's gradient: base_out is E[ids], times
            ``factor`` (a tensor of one number) where that is given.

    Saves ids. Raises TypeError/ValueError that name the argument. METHODS 1.15; LoRA, arXiv:2106.09685; DoRA,
    arXiv:2402.09353.
    """
    checks.tensor("base_out", base_out, "[..., embedding_dim]")
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: got {checks.describe(ids)}, wanted a tensor of int64 or int32")
    if base_out.shape[:-1] != ids.shape or base_out.dim() < 1:
        raise ValueError(f"base_out: got {checks.describe(base_out)}, wanted {[*ids.shape, 'd']} as ids")
    d = base_out.shape[-1]
    checks.tensor("lora_A", lora_A, "[r, num_embeddings]", 2)
    checks.tensor("lora_B", lora_B, "[embedding_dim, r]", 2)
    if lora_B.shape != (d, lora_A.shape[0]):
        raise ValueError(f"lora_B: got {checks.describe(lora_B)}, wanted [{d}, {lora_A.shape[0]}]")
    checks.number("scale", scale)
    checks.device("ids", ids, base_out=base_out, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude, norm=norm)
    checks.no_narrowing(base_out, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude)
    if magnitude is None:
        if norm is not None:
            raise ValueError("norm: got a tensor, wanted None without a magnitude")
    else:
        checks.vector("magnitude", magnitude, d, "embedding_dim")
        checks.vector("norm", norm, d, "embedding_dim")
        checks.tensor("weight", weight, "[num_embeddings, embedding_dim]", 2)
        checks.frozen(weight=weight)
        if weight.shape != (lora_A.shape[1], d):
            raise ValueError(f"weight: got {checks.describe(weight)}, wanted {[lora_A.shape[1], d]}")
    return update(base_out, ids, lora_A, lora_B, float(scale), padding_idx, magnitude, norm, weight, factor)
