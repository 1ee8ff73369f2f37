"""Low-rank linear over a stack of experts, and the whole layer of a mixture of experts (METHODS 1.10).

    rows sorted by expert, e the expert of row s
    h_s = drop(x_s) A_eᵀ      y_s = x_s W_eᵀ + γ h_s B_eᵀ + b_e
    backward: u_s = γ dy_s B_e      dx_s = dy_s W_e + mask * (u_s A_e)
              dA_e = Σ u_sᵀ drop(x_s)      dB_e = γ Σ dy_sᵀ h_s      db_e = Σ dy_s      over the rows s of expert e

The base product is the library's: torch's grouped_mm on a GPU, one product per expert on the CPU. The products with A
and B are the grouped ones of :mod:`spectral_ops.functional.segments`, whose adapters are the experts here; in Triton
they are predicted at 85 to 97 % of the memory's rate, so CUDA C++ would gain nothing. Nothing of the size of the
stack [E, d, k] is made, in forward or backward. Saved for backward: x and h [S, r]; where rows of x are gathered by
token, x [T, k] as it came and not the [S, k] gathered.

Rows from the last offset on belong to no expert here (another rank's): they are never read, and what comes of them is
zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, define_layer, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    draw_seed,
    fresh,
    rows,
    saved_hidden,
    wanted,
)
from spectral_ops.functional import dropout
from spectral_ops.functional.lowrank import fused
from spectral_ops.functional.routing import combine, routing_combine_op, sort_by_expert
from spectral_ops.functional.segments import segment_lift_op, segment_outer_op, segment_project_op

__all__ = ["experts_lowrank", "experts_mlp"]


# --- the base product ------------------------------------------------------------------------------------------------
# offsets [E + 1] int32, the first 0: expert e has rows offsets[e] to offsets[e + 1] - 1. Weights have any strides.


def _matmul_cost(x, weight, bias, offsets):
    S, d = x.shape[0], weight.shape[1]
    return Cost(2 * S * d * weight.shape[2], nbytes(x, weight, bias, offsets) + S * d * x.element_size())


def _matmul_samples(s):
    T, (x, W, b) = s.T, (s.x, s.W, s.bias)
    stack = torch.stack([W, -W, W, 2 * W])
    ends = torch.tensor([0, T // 7, T // 7, T - T // 5, T], dtype=torch.int32, device=s.device)
    yield x, stack, None, ends
    yield x, stack, torch.stack([b, b, -b, b]), ends.clamp(max=T // 2)
    yield s.rows(x), s.transposed(stack), None, ends


def _each_expert(offsets: torch.Tensor):
    """(expert, first row, end) for each that has any row. Reads the offsets."""
    ends = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if a < b]


@define(
    "experts_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    fake=lambda x, weight, bias, offsets: x.new_empty(x.shape[0], weight.shape[1]),
    cost=_matmul_cost,
    samples=_matmul_samples,
)
def experts_matmul_op(x, weight, bias, offsets):
    """y [S, d]: y_s = x_s W_eᵀ + b_e, zero for a row without expert; x [S, k], weight [E, d, k] in x's dtype."""
    acc = accumulate_dtype(x.dtype)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, a, b in _each_expert(offsets):
        part = x[a:b].to(acc) @ weight[e].to(acc).t()
        y[a:b] = part if bias is None else part + bias[e].to(acc)
    return y


def grouped_mm_takes(x, weight) -> bool:
    """Whether torch's grouped_mm computes this without waiting for the offsets: bfloat16 on compute capability 9 and
    10, rows that begin at multiples of 16 bytes, y's too, which it would pad, and fewer than 1,024 experts. Elsewhere,
    and on ROCm, it reads them and is a loop."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return False
    w = weight.stride()
    inner = w[2] == 1 and w[1] % 8 == 0 or w[1] == 1 and w[2] % 8 == 0
    return (
        inner
        and w[0] % 8 == 0
        and weight.shape[1] % 8 == 0
        and weight.shape[0] < 1024
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and not (x.data_ptr() % 16 or weight.data_ptr() % 16)
    )


def library_matmul(x, weight, bias, offsets):
    """experts_matmul as the library's products: grouped_mm, which takes no bias and leaves rows without expert as they
    are, or one product per expert. On a GPU where grouped_mm does not do, our own operator, which waits for nothing."""
    if bias is None and grouped_mm_takes(x, weight):
        return F.grouped_mm(x, weight.mT, offs=offsets[1:])
    if x.device.type != "cpu" or type(offsets) is not torch.Tensor:  # a fake tensor has no offsets to read
        return experts_matmul_op.default(x, weight, bias, offsets)
    y, end = x.new_empty(x.shape[0], weight.shape[1]), 0
    for e, a, end in _each_expert(offsets):
        w = weight[e].t()
        if bias is None:
            torch.mm(x[a:end], w, out=y[a:end])
        else:
            torch.addmm(bias[e], x[a:end], w, out=y[a:end])
    y[end:].zero_()
    return y


experts_matmul_op.library = library_matmul


def product(x, weight, bias, offsets):
    """x_s W_eᵀ + b_e [S, d]: the library's products, but where a backend is forced or a table has another choice."""
    run = experts_matmul_op if fused(experts_matmul_op, x.device) else library_matmul
    return run(x, weight, bias, offsets)


def nobody(rows: int, offsets: torch.Tensor) -> torch.Tensor:
    """[S, 1]: whether a row has no expert here."""
    return (torch.arange(rows, device=offsets.device) >= offsets[-1]).unsqueeze(1)


def scaled(B, scale, dtype):
    """γB in ``dtype``, rounded once: γ h might overflow in float16."""
    return (B if scale == 1 else B * scale).to(dtype)


# --- layers ----------------------------------------------------------------------------------------------------------
# x [S, k] sorted by expert; or x [T, k] with order [S], the row of x at each place, and places [T, K], the K places
# of each row. ``whole``: rows without expert are zero in every result; else they may hold anything on a GPU, and must
# not be read. Without A and B the frozen layer. ``needs`` is a mask of dx, dA, dB and db.

_PIECES = ("experts_matmul", "segment_project", "segment_lift_", "segment_outer", "seeded_dropout")


def _forward_fake(x, weight, bias, A, B, order, offsets, seed, scale, p, whole):
    S = x.shape[0] if order is None else order.shape[0]
    return x.new_empty(S, weight.shape[1]), x.new_empty((0,) if A is None else (S, A.shape[1]))


@define_layer(
    "experts_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? A, Tensor? B, Tensor? order, Tensor offsets,"
    " Tensor? seed, float scale, float p, bool whole) -> (Tensor, Tensor)",
    fake=_forward_fake,
    pieces=_PIECES,
)
def experts_forward_op(x, weight, bias, A, B, order, offsets, seed, scale, p, whole):
    """y [S, d] and h [S, r]."""
    xs = x if order is None else x.index_select(0, order)
    apart = bias is not None and grouped_mm_takes(xs, weight)  # the bias then rides on the update, as one rank more
    y = product(xs, weight, None if apart else bias, offsets)
    h = lifted = x.new_empty(0)
    b = None
    if A is not None:
        rows_of_A = xs if seed is None else dropout.seeded_dropout_op(x, seed, p)
        h = segment_project_op(rows_of_A, A.to(x.dtype), None if seed is None else order, offsets)
        lifted, b = h, scaled(B, scale, x.dtype)
    if apart:
        one = x.new_ones(y.shape[0], 1)
        lifted = one if b is None else torch.cat([h, one], 1)
        b = bias.unsqueeze(2) if b is None else torch.cat([b, bias.unsqueeze(2)], 2)
    if b is not None:
        segment_lift_op(y, lifted, b, None, offsets)
    if whole and grouped_mm_takes(xs, weight):  # every other product has made them zero
        y.masked_fill_(nobody(y.shape[0], offsets), 0)
    return y, h


def _backward_fake(dy, x, weight, A, B, order, places, offsets, seed, h, scale, p, needs, whole):
    dx = (dy.shape[0] if places is None else places.shape[0], weight.shape[2])
    return wanted(dy, needs, dx, A, B, (weight.shape[0], weight.shape[1]))


@define_layer(
    "experts_backward(Tensor dy, Tensor? x, Tensor weight, Tensor? A, Tensor? B, Tensor? order, Tensor? places,"
    " Tensor offsets, Tensor? seed, Tensor? h, float scale, float p, int needs, bool whole)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    pieces=(*_PIECES, "routing_combine"),
)
def experts_backward_op(dy, x, weight, A, B, order, places, offsets, seed, h, scale, p, needs, whole):
    """dx [S, k] (with places [T, k], summed over a row's places), dA, dB and db."""
    dy = rows(dy)
    need_x, need_A, need_B, need_bias = (bool(needs >> bit & 1) for bit in range(4))
    dx = dA = dB = db = u = None
    if A is not None and (need_x or need_A):
        u = segment_project_op(dy, scaled(B, scale, dy.dtype).mT, None, offsets)
    if need_A:
        read = x if seed is None else dropout.seeded_dropout_op(x, seed, p)
        dA = segment_outer_op(u, read, order, offsets).to(A.dtype)
    if need_B:
        h = saved_hidden(h, True, dy, B.shape[2])
        sums = segment_outer_op(h, dy, None, offsets)
        sums = sums if scale == 1 else sums.mul_(scale)
        dB = sums.mT.to(B.dtype).contiguous()
    if need_bias:
        db = segment_outer_op(dy.new_ones(dy.shape[0], 1), dy, None, offsets).squeeze(1).to(dy.dtype)
    if need_x:
        dx, share = product(dy, weight.mT, None, offsets), None
        if A is not None:
            share = dx if seed is None else torch.zeros_like(dx)
            segment_lift_op(share, u, A.to(dy.dtype).mT, None, offsets)
        if whole and grouped_mm_takes(dy, weight.mT):
            dx.masked_fill_(nobody(dx.shape[0], offsets), 0)
        if places is not None:
            dx = routing_combine_op(dx, None, places, offsets)
        if seed is not None and share is not None:
            share = share if places is None else routing_combine_op(share, None, places, offsets)
            dx.add_(dropout.seeded_dropout_op(share, seed, p))
    return fresh(dy, needs, dx, dA, dB, db)


class ExpertsFunction(Function):
    """Saves x, as it came, where A trains, and h where B does."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, order, places, offsets, seed, scale, p, whole):
        y, h = experts_forward_op(x, weight, bias, A, B, order, offsets, seed, scale, p, whole)
        _, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_A else None, weight, A, B, order, places, offsets, seed, h if need_B else None
        )  # fmt: skip
        ctx.scale, ctx.p, ctx.whole = scale, p, whole
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        needs = need_x | need_A << 1 | need_B << 2 | need_bias << 3
        x, weight, A, B, order, places, offsets, seed, h = ctx.saved_tensors
        dx, dA, dB, db = experts_backward_op(
            dy, x, weight, A, B, order, places, offsets, seed, h, ctx.scale, ctx.p, needs, ctx.whole
        )
        return (
            dx if need_x else None, None, db if need_bias else None, dA if need_A else None, dB if need_B else None,
            *[None] * 7,
        )  # fmt: skip


def linear(x, weight, bias, lora, order, places, offsets, p, whole):
    """One projection of the layer past its checks; lora: (A, B, scale) or None, weight [E, d, k] a view as it is."""
    A, B, scale = (None, None, 1.0) if lora is None else lora
    seed = draw_seed(x, p) if p and lora is not None else None
    if torch.is_grad_enabled():
        return apply(ExpertsFunction, x, x, weight, bias, A, B, order, places, offsets, seed, scale, p, whole)
    return apply_op(experts_forward_op, x, x, weight, bias, A, B, order, offsets, seed, scale, p, whole)[0]


# --- public functions ------------------------------------------------------------------------------------------------


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [..., f] of gate_up [..., 2 f], gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _check_stack(name, weight, E, like):
    checks.tensor(name, weight, "[experts, out_features, in_features]", 3)
    if E is not None:
        checks.size(name, weight, 0, E, "the experts")
    checks.device("x", like, **{name: weight})
    checks.frozen(**{name: weight})


def _check_lora(prefix, lora_A, lora_B, scale, weight, x):
    E, d, k = weight.shape
    a, b = f"{prefix}lora_A", f"{prefix}lora_B"
    checks.tensor(a, lora_A, "[experts, r, in_features]", 3)
    checks.tensor(b, lora_B, "[experts, out_features, r]", 3)
    for name, value in ((a, lora_A), (b, lora_B)):
        checks.size(name, value, 0, E, "the experts")
        checks.device("x", x, **{name: value})
        checks.no_narrowing(weight, **{name: value})
    checks.size(a, lora_A, 2, k, "in_features of the weight")
    checks.size(b, lora_B, 1, d, "out_features of the weight")
    if lora_A.shape[1] < 1:
        raise ValueError(f"{a}: got {checks.describe(lora_A)}, wanted at least one row (the rank)")
    checks.size(b, lora_B, 2, lora_A.shape[1], f"the rank, rows of {a}")
    checks.number(f"{prefix}scale", scale)


def _check_bias(name, bias, weight, x):
    if bias is None:
        return
    checks.tensor(name, bias, "[experts, out_features]", 2)
    if bias.shape != weight.shape[:2]:
        raise ValueError(f"{name}: got {checks.describe(bias)}, wanted {list(weight.shape[:2])} as the weight")
    checks.device("x", x, **{name: bias})
    checks.same_dtype("the weight", weight, **{name: bias})


def _begins(offsets, E, S, x):
    """offsets [E] of ends as [E + 1] int32 that begin with 0, in order and within the rows."""

    def wrong(kind, got):  # written only where it is raised: S in a string is a constant to the compiler
        ends = f"int32 or int64 [{E}], the end of each expert's rows in x, none before the one in front, at most {S}"
        return kind(f"offsets: got {got}, wanted {ends}")

    if not isinstance(offsets, torch.Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        raise wrong(TypeError, checks.describe(offsets))
    if offsets.shape != (E,):
        raise wrong(ValueError, checks.describe(offsets))
    checks.device("x", x, offsets=offsets)
    if offsets.device.type == "cpu" and type(offsets) is torch.Tensor and not torch.compiler.is_compiling():
        ends = offsets.tolist()
        if any(a > b for a, b in zip([0, *ends], [*ends, S], strict=True)):
            raise wrong(ValueError, ends)
        return F.pad(offsets.to(torch.int32), (1, 0))
    return F.pad(offsets.clamp(0, S).cummax(0).values.to(torch.int32), (1, 0))


@calls(experts_forward_op, experts_backward_op)
def experts_lowrank(
    x, weight, offsets, lora_A, lora_B, bias=None, *, scale=1.0, transposed=False, dropout_p=0.0, training=False
):
    """Linear layers of E experts over rows sorted by expert, each with a low-rank update of its own:
    y_s = x_s W_eᵀ + scale drop(x_s) A_eᵀ B_eᵀ + b_e for a row s of expert e.

    Args:
        x: [S, k], float64/float32/bfloat16/float16, any strides.
        weight: W [E, d, k], frozen, in x's dtype (under autocast both are cast, a float32 stack to a copy);
            ``transposed``: [E, k, d].
        offsets: int32 or int64 [E], where each expert's rows end (what torch's grouped_mm takes); expert e has rows
            offsets[e - 1] to offsets[e] - 1. Rows from the last end on have no expert here: they are never read, their
            outputs and gradients are zero. On the CPU offsets out of order, or past S, raise ValueError; a GPU is not
            waited for, and there each is taken as no less than the one in front and no more than S.
        lora_A: A [E, r, k]; lora_B: B [E, d, r], any strides; or None and None, the frozen layer. They may be float32
            over a narrower x; gradients come back in their dtype, and are zero for an expert without rows.
        bias: [E, d] or None, in x's dtype; may be trainable.
        scale: γ, a number.
        dropout_p, training: inverted dropout on the adapter branch, active only while training.

    Returns y [S, d] in x's dtype. Saves x and h [S, r] for backward; makes nothing of the size of the stack.
    Raises TypeError/ValueError that name the argument. METHODS 1.10.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.tensor("x", x, "[rows, in_features]", 2)
    _check_stack("weight", weight, None, x)
    checks.same_dtype("x", x, weight=weight)
    weight = weight.mT if transposed else weight
    checks.size("x", x, 1, weight.shape[2], "in_features of weight")
    _check_bias("bias", bias, weight, x)
    lora = None
    if lora_A is not None or lora_B is not None:
        _check_lora("", lora_A, lora_B, scale, weight, x)
        lora = lora_A, lora_B, float(scale)
    checks.probability("dropout_p", dropout_p)
    begins = _begins(offsets, weight.shape[0], x.shape[0], x)
    return linear(x, weight, bias, lora, None, None, begins, dropout_p if training else 0.0, True)


@calls(experts_forward_op, experts_backward_op)
def experts_mlp(
    x,
    top_k_index,
    top_k_weights,
    up,
    down,
    *,
    up_lora=None,
    down_lora=None,
    up_bias=None,
    down_bias=None,
    activation=None,
    post_norm=None,
    transposed=False,
    dropout_p=0.0,
    training=False,
):
    """The expert layer of a mixture: each token through its K experts, weighted, with low-rank updates on either
    projection. out_t = Σ_j w_tj post_norm(down_e(activation(up_e(x_t)))) with e = top_k_index[t, j].

    Args:
        x: [T, k]; cast to the weights' dtype where it has another, as transformers' grouped experts do.
        top_k_index: int32 or int64 [T, K]. An index from E on, or a negative one, is another rank's expert: it adds
            nothing, and nothing of it is computed.
        top_k_weights: w [T, K], floating-point; its gradient is computed.
        up: [E, u, k], gate and up stacked for a gated layer (u = 2 f); down: [E, d, f]; frozen, of one dtype;
            ``transposed``: [E, k, u] and [E, f, d].
        up_lora, down_lora: (A [E, r, in_features], B [E, out_features, r], scale), or None: that projection is frozen.
        up_bias: [E, u]; down_bias: [E, d]; or None, in the weights' dtype; may be trainable.
        activation: from [S, u] to [S, f], row by row; None: silu(gate) * up, gate in the first half.
            One that trains parameters of its own must skip rows of another rank's experts, which hold anything.
        post_norm: from [S, d] to [S, d], row by row, or None.
        dropout_p, training: inverted dropout on the adapter branches, active only while training. A token's mask is the
            same for all its experts.

    Returns out [T, d] in x's dtype, summed over a token's experts in at least float32. Tokens are sorted by expert on
    their device, which is not waited for. Saves what the frozen layer saves, x, the activation's output and each h
    [S, r]; makes nothing of the size of a stack. Raises TypeError/ValueError that name the argument. METHODS 1.10.
    """
    checks.tensor("x", x, "[tokens, in_features]", 2)
    _check_stack("up", up, None, x)
    _check_stack("down", down, up.shape[0], x)
    checks.same_dtype("up", up, down=down)
    up, down = (up.mT, down.mT) if transposed else (up, down)
    E = up.shape[0]
    checks.size("x", x, 1, up.shape[2], "in_features of up")
    _check_bias("up_bias", up_bias, up, x)
    _check_bias("down_bias", down_bias, down, x)
    for prefix, lora, weight in (("up_", up_lora, up), ("down_", down_lora, down)):
        if lora is not None:
            if not isinstance(lora, tuple) or len(lora) != 3:
                raise TypeError(f"{prefix}lora: got {type(lora).__name__}, wanted (lora_A, lora_B, scale) or None")
            _check_lora(prefix, *lora, weight, x)
    checks.probability("dropout_p", dropout_p)
    _check_routing(x, top_k_index, top_k_weights)
    p, dtype = dropout_p if training else 0.0, x.dtype
    x = x.to(up.dtype)
    order, places, offsets = sort_by_expert(top_k_index, E)
    hidden = (activation or swiglu)(linear(x, up, up_bias, up_lora, order, places, offsets, p, False))
    _check_rows("activation", hidden, order.shape[0], down.shape[2], "in_features of down")
    y = linear(hidden.to(down.dtype), down, down_bias, down_lora, None, None, offsets, p, post_norm is not None)
    if post_norm is not None:
        y = post_norm(y)
        _check_rows("post_norm", y, order.shape[0], down.shape[1], "out_features of down")
    return combine(y, top_k_weights, places, offsets).to(dtype)


def _check_rows(name, value, S, columns, why):
    """What a callable made of the S rows."""
    checks.tensor(name, value, "[rows, features]", 2)
    checks.size(name, value, 0, S, "a row for each it gets")
    checks.size(name, value, 1, columns, why)


def _check_routing(x, top_k_index, top_k_weights):
    def wrong(kind):  # as above
        text = f"int32 or int64 [{x.shape[0]}, K], the experts of each token"
        return kind(f"top_k_index: got {checks.describe(top_k_index)}, wanted {text}")

    if not isinstance(top_k_index, torch.Tensor) or top_k_index.dtype not in (torch.int32, torch.int64):
        raise wrong(TypeError)
    if top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
        raise wrong(ValueError)
    checks.tensor("top_k_weights", top_k_weights, "as top_k_index", 2)
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights: got {checks.describe(top_k_weights)}, wanted {list(top_k_index.shape)} as top_k_index"
        )
    checks.device("x", x, top_k_index=top_k_index, top_k_weights=top_k_weights)
