"""RandLoRA: an update of full rank, trained through diagonals around frozen random bases (METHODS 1.13;
arXiv:2502.00987).

    S(p, j) = λ(p) γ(p mod n, j) A(p div n, j)      ΔW = γ' B S  [M, m]      p < N = r n
    k = m (a layer no wider than its outputs)       y = x (W + ΔW)ᵀ + b
    k > d = m                                       y = x (W + ΔWᵀ)ᵀ + b
    with s [T, m] and l [T, M] the sides of x and dy:      H = l B      dS = γ' Hᵀ s
    dγ(b, j) = Σ_i dS(i n + b, j) λ(i n + b) A(i, j)       dλ(p) = Σ_j dS(p, j) γ(p mod n, j) A(p div n, j)

A [r, m] and B [M, N] are frozen, m = min(d, k), M = max(d, k), and N is at least m. So either order of the products
costs about as much as W itself, and which one is the cheaper depends on the number of tokens:

    few     y = x Wᵀ + γ' (x Sᵀ) Bᵀ         2 T N (d + k) operations; H [T, N] lives during the call
    many    W' = W + ΔW, row tile by tile    2 N d k, once per direction, and dS = γ' Bᵀ (lᵀ s) the same way

S, W' and dS live in the shared buffer: in tiles, or S whole where there are many tokens. Saved for backward: x, or,
where k > d and the tokens are few, H [T, N] in its place. All products are the library's, since they are of W's size;
what a kernel of its own could save is the pass that fills a tile of S.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype, calls, define_layer
from spectral_ops.core import checks
from spectral_ops.core.autograd import (
    apply,
    apply_op,
    autocast_arguments,
    backward_pass,
    contiguous_copy,
    fresh,
    mm,
    rows,
    shaped,
    wanted,
)
from spectral_ops.core.scratch import scratch

__all__ = ["randlora_linear", "randlora_update"]

TILE = 2048  # rows or columns of a basis at a time: enough for the library's full speed


# --- which products --------------------------------------------------------------------------------------------------


def merges(T: int, weight: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether W + ΔW is formed: with many tokens, in a dtype that rounds no small change away."""
    if weight is None or dtype is not accumulate_dtype(dtype):
        return False
    d, k = weight.shape
    return d * k < T * (d + k)


def _keeps_hidden(T, k, weight, A, dtype):
    """Whether forward has H [T, N] to keep."""
    return A.shape[1] != k and not merges(T, weight, dtype)


# --- bases -----------------------------------------------------------------------------------------------------------


class Bases:
    """A, B, λ and γ as the products read them, tile by tile."""

    def __init__(self, A, B, lambda_, gamma, dtype):
        acc = accumulate_dtype(dtype)
        self.A, self.lambda_, self.gamma = A.to(acc), lambda_.to(acc), gamma.to(acc)
        self.B, self.dtype, self.acc = B, dtype, acc
        (self.r, self.m), (self.n, self.N), self.M = A.shape, (gamma.shape[0], lambda_.numel()), B.shape[0]

    def fill(self, out: torch.Tensor, bases: slice, columns: slice) -> torch.Tensor:
        """Rows of ``bases`` times n, and columns, of S as [N', w] in the products' dtype; ``out`` flat, in acc."""
        A, lambda_, gamma = self.A[bases, columns], self.lambda_[bases], self.gamma[:, columns]
        S = out[: lambda_.numel() * A.shape[1]].view(*lambda_.shape, A.shape[1])
        torch.mul(A.unsqueeze(1), gamma, out=S).mul_(lambda_.unsqueeze(2))
        return S.view(-1, A.shape[1]).to(self.dtype)

    def lease(self, size: int):
        return scratch.lease((size,), self.acc, self.B.device)

    @contextlib.contextmanager
    def whole(self):
        """Memory of S [N, m], of a row tile [TILE, m] of W, and of one of B, which takes none in its own dtype."""
        S, tile = self.N * self.m, TILE * self.m
        with self.lease(S + tile + (0 if self.B.dtype is self.dtype else TILE * self.N)) as memory:
            yield memory[:S].view(self.N, self.m), memory[S : S + tile].view(TILE, self.m), memory[S + tile :]

    def small(self, axis: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """S by rows (axis 0) or by columns (axis 1)."""
        step = max(TILE // self.n, 1) if axis == 0 else TILE
        with self.lease(step * self.n * self.m if axis == 0 else self.N * min(step, self.m)) as tile:
            for start in range(0, self.r if axis == 0 else self.m, step):
                part = slice(start, start + step)
                if axis == 0:
                    yield slice(start * self.n, (start + step) * self.n), self.fill(tile, part, slice(None))
                else:
                    yield part, self.fill(tile, slice(None), part)

    def large(self, axis: int, memory: torch.Tensor | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """B in the products' dtype: by rows or columns, cast into ``memory``; whole, where it is asked for without."""
        if self.B.dtype is self.dtype and memory is None:
            yield slice(None), self.B
            return
        with (
            contextlib.nullcontext(memory) if memory is not None else self.lease(TILE * self.B.shape[1 - axis]) as flat
        ):
            for start in range(0, self.B.shape[axis], TILE):
                part = slice(start, start + TILE)
                B = self.B[part] if axis == 0 else self.B[:, part]
                if B.dtype is not self.dtype:
                    B = flat[: B.numel()].view(B.shape).copy_(B) if flat.dtype is self.dtype else B.to(self.dtype)
                yield part, B

    def hidden(self, t: torch.Tensor, small: bool) -> torch.Tensor:
        """t Sᵀ of the small side, or t B of the large one: [T, N]."""
        h = t.new_empty(t.shape[0], self.N)
        for part, tile in self.small(0) if small else self.large(1):
            torch.mm(t, tile.t() if small else tile, out=h[:, part])
        return h

    def add(self, out: torch.Tensor, h: torch.Tensor, small: bool, scale: float) -> torch.Tensor:
        """out += scale h S towards the small side, or scale h Bᵀ towards the large one."""
        for part, tile in self.small(1) if small else self.large(0):
            out[:, part].addmm_(h, tile if small else tile.t(), alpha=scale)
        return out

    def merged(self, t: torch.Tensor, weight: torch.Tensor, small: bool, scale: float) -> torch.Tensor:
        """t times W + scale B S, for weight [M, m]: from the large side to the small one (small), or back."""
        y = t.new_empty(t.shape[0], self.m if small else self.M)
        with self.whole() as (S, changed, cast):
            self.fill(S.view(-1), slice(None), slice(None))
            for part, B in self.large(0, cast):
                W = torch.addmm(weight[part], B, S, alpha=scale, out=changed[: B.shape[0]])
                if small:
                    y.addmm_(t[:, part], W, beta=min(part.start, 1))
                else:
                    torch.mm(t, W.t(), out=y[:, part])
        return y

    def contract(self, dS: torch.Tensor, columns: slice, d_lambda, d_gamma) -> None:
        """Columns of dS [N, w], which are overwritten, enter the gradients that are not None."""
        G = dS.view(self.r, self.n, -1).mul_(self.A[:, columns].unsqueeze(1)).transpose(0, 1)
        if d_gamma is not None:
            d_gamma[:, columns] = torch.bmm(self.lambda_.t().unsqueeze(1), G).squeeze(1)
        if d_lambda is not None:
            d_lambda += torch.bmm(G, self.gamma[:, columns].unsqueeze(2)).squeeze(2).t()

    def gradients(self, h, large, small, scale, need_lambda, need_gamma) -> list[torch.Tensor | None]:
        """dλ and dγ in acc: from h = large B where it is there or is the cheaper way, else from largeᵀ small."""
        T, (M, m, N) = small.shape[0], (self.M, self.m, self.N)
        d_lambda = torch.zeros_like(self.lambda_) if need_lambda else None
        d_gamma = torch.empty_like(self.gamma) if need_gamma else None
        narrow = self.dtype is not self.acc
        if h is None and not narrow and (T + N) * M * m < T * N * (M + m):
            with self.whole() as (dS, tile, cast):
                for part, B in self.large(0, cast):
                    G = torch.mm(large[:, part].t(), small, out=tile[: B.shape[0]])
                    dS.addmm_(B.t(), G, beta=min(part.start, 1))
                self.contract(dS, slice(None), d_lambda, d_gamma)
        else:
            h = self.hidden(large, False) if h is None else h
            with self.lease(N * min(TILE, m)) as memory:
                for start in range(0, m, TILE):
                    part = slice(start, start + TILE)
                    s = small[:, part]
                    tile = None if narrow else memory[: N * s.shape[1]].view(N, -1)
                    dS = mm(h.t(), s, self.acc) if narrow else torch.mm(h.t(), s, out=tile)
                    self.contract(dS, part, d_lambda, d_gamma)
        return [t if t is None else t.mul_(scale) for t in (d_lambda, d_gamma)]


# --- layers ----------------------------------------------------------------------------------------------------------

_BASES = "Tensor A, Tensor B, Tensor lambda_, Tensor gamma"


def _forward_fake(x, weight, base_out, A, B, lambda_, gamma, bias, scale):
    T, k, d = math.prod(x.shape[:-1]), x.shape[-1], base_out.shape[-1] if weight is None else weight.shape[0]
    kept = _keeps_hidden(T, k, weight, A, x.dtype)
    return x.new_empty(*x.shape[:-1], d), x.new_empty((T, lambda_.numel()) if kept else (0,))


@define_layer(
    f"randlora_linear_forward(Tensor x, Tensor? weight, Tensor? base_out, {_BASES}, Tensor? bias, float scale)"
    " -> (Tensor, Tensor)",
    fake=_forward_fake,
    pieces=(),
)
def randlora_linear_forward_op(x, weight, base_out, A, B, lambda_, gamma, bias, scale):
    """y [..., d], and H [T, N] where backward reads it in x's place, else empty [0].

    Without a weight y is a copy of base_out with the update added.
    """
    if (weight is None) == (base_out is None):
        raise RuntimeError("weight and base_out: wanted exactly one of them")
    x2, bases = rows(x), Bases(A, B, lambda_, gamma, x.dtype)
    tall, h = A.shape[1] == x.shape[-1], None
    if merges(x2.shape[0], weight, x.dtype):
        y = bases.merged(x2, weight if tall else weight.t(), not tall, scale)
        y = y if bias is None else y.add_(bias)
    else:
        h = bases.hidden(x2, tall)
        y = rows(contiguous_copy(base_out)) if weight is None else F.linear(x2, weight, bias)
        bases.add(y, h, not tall, scale)
    return shaped(y, x), x.new_empty(0) if tall or h is None else h


@define_layer(
    f"randlora_linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? weight, {_BASES}, float scale, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda dy, x, h, weight, A, B, lambda_, gamma, scale, needs: wanted(
        dy, needs, (*dy.shape[:-1], _in_features(dy, A, B)), lambda_, gamma, dy.shape[-1:]
    ),
    pieces=(),
)
def randlora_linear_backward_op(dy, x, h, weight, A, B, lambda_, gamma, scale, needs):
    """dx, dλ, dγ and db; empty [0] where ``needs`` has no bit. Without a weight dx is the update's share.

    dλ and dγ are made of h where that is given, else of x.
    """
    dy2, (need_x, need_lambda, need_gamma, need_bias) = rows(dy), (bool(needs >> bit & 1) for bit in range(4))
    k, bases = _in_features(dy, A, B), Bases(A, B, lambda_, gamma, dy.dtype)
    tall, merging = A.shape[1] == k, merges(dy2.shape[0], weight, dy.dtype)
    dx = d_lambda = d_gamma = db = dy
    hidden = None  # of dy
    if need_x and merging:
        dx = bases.merged(dy2, weight if tall else weight.t(), tall, scale)
    elif need_x:
        hidden = bases.hidden(dy2, not tall)
        dx = dy2.new_zeros(dy2.shape[0], k) if weight is None else dy2 @ weight
        bases.add(dx, hidden, tall, scale)
    if need_lambda or need_gamma:
        if x is None and (tall or h is None):
            raise ValueError("x: got None, wanted a tensor for what is asked for")
        large, small = (dy2, rows(x)) if tall else (None if x is None else rows(x), dy2)
        found = bases.gradients(hidden if tall else h, large, small, scale, need_lambda, need_gamma)
        d_lambda, d_gamma = (
            dy if t is None else t.to(like.dtype) for t, like in zip(found, (lambda_, gamma), strict=True)
        )
    if need_x:
        dx = dx.reshape(*dy.shape[:-1], k)
    if need_bias:
        db = dy2.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
    return fresh(dy, needs, dx, d_lambda, d_gamma, db)


def _in_features(dy, A, B):
    """k, of d and the two sides of the bases."""
    return A.shape[1] if B.shape[0] == dy.shape[-1] else B.shape[0]


# --- autograd --------------------------------------------------------------------------------------------------------


class RandLoRAFunction(Function):
    """Over a weight, or over what somebody else's layer returned; saves x, or H."""

    @staticmethod
    def forward(ctx, x, weight, base_out, A, B, lambda_, gamma, bias, scale):
        y, h = randlora_linear_forward_op(x, weight, base_out, A, B, lambda_, gamma, bias, scale)
        trained = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        kept = _keeps_hidden(math.prod(x.shape[:-1]), x.shape[-1], weight, A, x.dtype)
        ctx.save_for_backward(
            x if trained and not kept else None, h if trained and kept else None, weight, A, B, lambda_, gamma
        )
        ctx.scale = scale
        return y

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        need_x, _, need_out, _, _, need_lambda, need_gamma, need_bias, _ = ctx.needs_input_grad
        needs = need_x | need_lambda << 1 | need_gamma << 2 | need_bias << 3
        dx, d_lambda, d_gamma, db = randlora_linear_backward_op(dy, *ctx.saved_tensors, ctx.scale, needs)
        return (
            dx if need_x else None, None, dy if need_out else None, None, None, d_lambda if need_lambda else None,
            d_gamma if need_gamma else None, db if need_bias else None, None,
        )  # fmt: skip


def linear(x, weight, base_out, A, B, lambda_, gamma, bias, scale):
    """:func:`randlora_linear`, or with base_out :func:`randlora_update`, past its checks."""
    args = x, weight, base_out, A, B, lambda_, gamma, bias, scale
    if torch.is_grad_enabled():
        return apply(RandLoRAFunction, x, *args)
    return apply_op(randlora_linear_forward_op, x, *args)[0]


# --- public functions ------------------------------------------------------------------------------------------------


def _check(x, out_features, A, B, lambda_, gamma, scale):
    k = x.shape[-1]
    m, M = min(out_features, k), max(out_features, k)
    checks.tensor("randlora_lambda", lambda_, "[r, bases]", 2)
    r, n = lambda_.shape
    for name, value, shape, why in (
        ("randlora_A", A, (r, m), "r, the smaller of in_features and out_features"),
        ("randlora_B", B, (M, r * n), "the larger of in_features and out_features, r times bases"),
        ("randlora_gamma", gamma, (n, m), "bases, the smaller of in_features and out_features"),
    ):
        checks.tensor(name, value, f"{list(shape)}", 2)
        if value.shape != shape:
            raise ValueError(f"{name}: got {checks.describe(value)}, wanted {list(shape)} ({why})")
    checks.frozen(randlora_A=A, randlora_B=B)
    checks.device("x", x, randlora_A=A, randlora_B=B, randlora_lambda=lambda_, randlora_gamma=gamma)
    checks.no_narrowing(x, randlora_lambda=lambda_, randlora_gamma=gamma)
    checks.number("scale", scale)


@calls(randlora_linear_forward_op, randlora_linear_backward_op)
def randlora_linear(x, weight, randlora_A, randlora_B, randlora_lambda, randlora_gamma, bias=None, *, scale=1.0):
    """Linear layer with a RandLoRA update: y = x (W + ΔW)ᵀ + b, ΔW = scale B S (transposed where k > d).

    S [r n, m] has λ(i, b) γ(b, j) A(i, j) in row i n + b; m = min(d, k), M = max(d, k).

    Args:
        x: [..., k], float64/float32/bfloat16/float16; any strides, may be empty.
        weight: W [d, k], frozen, in x's dtype (under autocast both are cast).
        randlora_A: A [r, m]; randlora_B: B [M, r n]; frozen, any floating dtype and row stride.
        randlora_lambda: λ [r, n]; randlora_gamma: γ [n, m]; trained, float32 allowed over a narrower x.
        bias: [d] or None, in x's dtype; may be trainable.
        scale: a number, α/r in PEFT.

    Returns y [..., d] in x's dtype. Saves x for backward, or [T, r n] in its place where k > d.
    Raises TypeError/ValueError that name the argument. METHODS 1.13; RandLoRA, arXiv:2502.00987.
    """
    x, weight, bias = autocast_arguments(x, weight, bias)
    checks.linear(x, weight, bias)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    bases = randlora_A, randlora_B, randlora_lambda, randlora_gamma
    _check(x, weight.shape[0], *bases, scale)
    return linear(x, weight, None, *bases, bias, float(scale))


@calls(randlora_linear_forward_op, randlora_linear_backward_op)
def randlora_update(base_out, x, randlora_A, randlora_B, randlora_lambda, randlora_gamma, *, scale=1.0):
    """The same update over base_out [..., d] = base(x), which somebody else computed, as a new tensor.

    The other arguments are those of :func:`randlora_linear`; x is cast to base_out's dtype.
    """
    checks.base(base_out, x)
    x = x.to(base_out.dtype)
    bases = randlora_A, randlora_B, randlora_lambda, randlora_gamma
    _check(x, base_out.shape[-1], *bases, scale)
    return linear(x, None, base_out, *bases, None, float(scale))
