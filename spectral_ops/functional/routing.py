"""Experts' results back to their tokens (METHODS 1.10): sums of rows over the inverse of the order that sorted them.

    out_t = Σ_j w_tj y[places_tj]      backward: dy[places_tj] = w_tj dout_t      dw_tj = dout_t · y[places_tj]

Pair (t, j) of a token and one of its K experts has row places[t, j] of y, which is sorted by expert. Rows from
offsets[-1] on are another rank's: nobody reads them, their terms are 0, and so are their gradients. Token by token, the
sum needs no atomics and no [T, K, d]; the gradient reads y and dout once and writes dy once. CUDA C++ would gain
nothing: whole rows are moved, for which Triton's loads are as wide, and nothing is multiplied that takes tensor cores.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, define, nbytes
from spectral_ops.core.autograd import apply, apply_op, backward_pass, rows

__all__: list[str] = []


def _terms(y, places, offsets):
    """(j, tokens, rows) for each j: the tokens whose j-th row somebody has, and those rows. For the CPU, and as a
    reference: reads what it is given."""
    end = int(offsets[-1])
    if not 0 <= end <= y.shape[0]:
        raise ValueError(f"offsets: got {end} at the end, wanted 0 to {y.shape[0]}, the rows")
    if places.numel() and (low := int(places.amin())) < 0:
        raise ValueError(f"places: got {low}, wanted numbers from 0 on")
    for j in range(places.shape[1]):
        tokens = (places[:, j] < end).nonzero().squeeze(1)
        yield j, tokens, places[tokens, j]


def _combine_cost(y, weights, places, offsets):
    return Cost(2 * places.numel() * y.shape[1], nbytes(y, weights, places) + places.shape[0] * y[:1].nbytes)


def _routed(s, K: int):
    """y [T K, d], places [T, K] and int32 offsets [4], behind whose last number y has NaN."""
    S = s.T * K
    last = S - S // 5
    y = s.randn(S, s.d)
    y[last:] = float("nan")
    offsets = torch.tensor([0, S // 3, S // 3, last], dtype=torch.int32, device=s.device)
    return y, s.order(S).view(s.T, K), offsets


def _combine_samples(s):
    for K, dtype in ((2, s.acc), (1, s.dtype), (3, None)):
        y, places, offsets = _routed(s, K)
        weights = None if dtype is None else s.randn(s.T, K, dtype=dtype)
        yield (y if K != 3 else s.rows(y)), weights, places, offsets


@define(
    "routing_combine(Tensor y, Tensor? weights, Tensor places, Tensor offsets) -> Tensor",
    fake=lambda y, weights, places, offsets: y.new_empty(places.shape[0], y.shape[1]),
    cost=_combine_cost,
    samples=_combine_samples,
)
def routing_combine_op(y, weights, places, offsets):
    """out [T, d] in y's dtype: summed in float32 (float64) and rounded once; y [S, d], weights [T, K] in any dtype
    (None: all 1), places [T, K] int64. ``offsets`` int32 or int64, of which the last counts: where rows are nobody's.
    On the CPU one past the rows, or a negative place, raises; a GPU skips what is no row."""
    out = y.new_zeros(places.shape[0], y.shape[1], dtype=accumulate_dtype(y.dtype))
    for j, tokens, own in _terms(y, places, offsets):
        term = y[own].to(out.dtype)
        out[tokens] += term if weights is None else term * weights[tokens, j, None].to(out.dtype)
    return out.to(y.dtype)


def _backward_fake(dout, y, weights, places, offsets, need_weights):
    dtype = accumulate_dtype(y.dtype) if weights is None else weights.dtype
    return dout.new_empty(y.shape), dout.new_empty(places.shape if need_weights else 0, dtype=dtype)


def _backward_cost(dout, y, weights, places, offsets, need_weights):
    each, dweights = places.numel() * y.shape[1], _backward_fake(dout, y, weights, places, offsets, need_weights)[1]
    moved = nbytes(dout, weights, places, dweights) + (1 + need_weights) * nbytes(y)
    return Cost((1 + 2 * need_weights) * each, moved)


def _backward_samples(s):
    for (y, weights, places, offsets), need_weights in zip(_combine_samples(s), (True, True, False), strict=True):
        dout = s.randn(s.T, s.d)
        yield (dout if weights is None else s.rows(dout)), y, weights, places, offsets, need_weights


@define(
    "routing_combine_backward(Tensor dout, Tensor y, Tensor? weights, Tensor places, Tensor offsets, bool need_weights)"
    " -> (Tensor, Tensor)",
    fake=_backward_fake,
    cost=_backward_cost,
    samples=_backward_samples,
)
def routing_combine_backward_op(dout, y, weights, places, offsets, need_weights):
    """dy [S, d] in dout's dtype, zero from offsets[-1] on, and dweights [T, K] in the weights' dtype (empty [0] where
    nobody wants them: then y's contents are not read). Each row of y has at most one pair."""
    acc = accumulate_dtype(dout.dtype)
    dy, dweights = (t.zero_() for t in _backward_fake(dout, y, weights, places, offsets, need_weights))
    for j, tokens, own in _terms(y, places, offsets):
        g = dout[tokens].to(acc)
        dy[own] = (g if weights is None else g * weights[tokens, j, None].to(acc)).to(dy.dtype)
        if need_weights:
            dweights[tokens, j] = (g * y[own].to(acc)).sum(1).to(dweights.dtype)
    return dy, dweights


# --- the order, and autograd -----------------------------------------------------------------------------------------


def sort_by_expert(top_k_index: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """order [S], places [T, K] and offsets [E + 1] of top_k_index [T, K], computed on its device, which is not waited
    for: the token at each place, the places of each token, and where each expert's begin. Pairs of another rank's
    experts (indices from E on, or negative) come last."""
    T, K = top_k_index.shape
    ids = top_k_index.reshape(-1)
    ids = ids.masked_fill(ids < 0, torch.iinfo(ids.dtype).max)
    ids, pairs = torch.sort(ids, stable=True)
    numbers = torch.arange(max(T * K, E + 1), device=ids.device)
    offsets = torch.searchsorted(ids, numbers[: E + 1].to(ids.dtype), out_int32=True)
    places = torch.empty_like(pairs).scatter_(0, pairs, numbers[: T * K]).reshape(T, K)
    return pairs // K, places, offsets


class CombineFunction(Function):
    """out [T, d] of :func:`combine`; saves y where the weights take a gradient."""

    @staticmethod
    def forward(ctx, y, weights, places, offsets):
        need_weights = ctx.needs_input_grad[1]
        ctx.save_for_backward(y if need_weights else None, weights, places, offsets)
        return routing_combine_op(y, weights, places, offsets)

    @staticmethod
    @backward_pass
    def backward(ctx, dout):
        y, weights, places, offsets = ctx.saved_tensors
        need_y, need_weights, *_ = ctx.needs_input_grad
        if y is None:  # of which only the shape is asked for
            y = dout.new_empty(()).expand(places.numel(), dout.shape[1])
        dy, dweights = routing_combine_backward_op(rows(dout), y, weights, places, offsets, need_weights)
        return dy if need_y else None, dweights if need_weights else None, None, None


def combine(y, weights, places, offsets):
    """out [T, d]: out_t = Σ_j w_tj y[places[t, j]], past places without expert, for y [S, d] and weights [T, K]."""
    if torch.is_grad_enabled():
        return apply(CombineFunction, y, y, weights, places, offsets)
    return apply_op(routing_combine_op, y, y, weights, places, offsets)
