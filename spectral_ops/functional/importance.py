"""AdaLoRA's importance: which triplets (row of A, column of B, entry of E) of a whole model matter (METHODS 1.6).

    I = |p * dp|      Ī becomes β₁ Ī + (1 - β₁) I      Ū becomes β₂ Ū + (1 - β₂) |I - Ī|, with the new Ī
    score_i = (Ī Ū)(E_i) + mean_k (Ī Ū)(A_i,:) + mean_d (Ī Ū)(B_:,i)

One operator takes every layer: it reads p, dp, Ī and Ū once, writes Ī and Ū, and sums the scores on the way. Ī and Ū of
all parameters are two flat buffers, A, B and E of one layer after the other. A second operator finds the threshold over
all scores and writes zeros into E; nothing comes back to the host. The regulariser that keeps the rows of A and the
columns of B orthonormal is ‖AAᵀ - I‖, computed for all matrices of one shape at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, backward_pass

__all__ = ["adalora_importance", "adalora_prune", "orthogonality_loss"]


# --- operators -------------------------------------------------------------------------------------------------------


def triplets(params: Sequence[torch.Tensor]) -> int:
    """How many scores the layers of ``params`` (A, B, E of one after the other) have."""
    return sum(B.shape[1] for B in params[1::3])


def _update_cost(exp_avg, uncertainty, params, grads, shards, beta1, beta2, score):
    n = exp_avg.numel()
    scores = triplets(params) * exp_avg.element_size() if score else 0
    return Cost((9 + 2 * score) * n, nbytes(*params, *grads) + 2 * nbytes(exp_avg, uncertainty) + scores)


def _update_samples(s):
    params, grads = ([s.randn(*size) for size in ((s.r, s.k), (s.d, s.r), (s.r, 1))] for _ in range(2))
    n = sum(p.numel() for p in params)
    for score in (True, False):
        yield s.randn(n, dtype=s.acc).abs(), s.randn(n, dtype=s.acc).abs(), params, grads, [], 0.85, 0.8, score


@define(
    "importance_update_(Tensor(a!) exp_avg, Tensor(b!) uncertainty, Tensor[] params, Tensor[] grads, int[] shards,"
    " float beta1, float beta2, bool score) -> Tensor",
    fake=lambda exp_avg, uncertainty, params, grads, shards, beta1, beta2, score: exp_avg.new_empty(
        triplets(params) if score else 0
    ),
    cost=_update_cost,
    samples=_update_samples,
)
def importance_update_op(exp_avg, uncertainty, params, grads, shards, beta1, beta2, score):
    """Ī and Ū (exp_avg and uncertainty, flat, float32 or float64) after one more step, and the scores where asked for.

    params: A [r', k], B [d', r], E [r'', 1] (or [r'']) of every layer, in turn; grads: theirs. Parts of larger
    tensors, split along the first dimension, come with three numbers a layer in ``shards``: the first row held of A,
    the first of E, and d; an empty list stands for whole tensors.
    """
    wide, start, first = exp_avg.dtype, 0, 0
    scores = exp_avg.new_zeros(triplets(params) if score else 0)
    for i in range(0, len(params), 3):
        products = []
        for p, g in zip(params[i : i + 3], grads[i : i + 3], strict=True):
            part = slice(start, start + p.numel())
            size = (p.to(wide) * g.to(wide)).abs().flatten()
            m = exp_avg[part].mul_(beta1).add_(size, alpha=1 - beta1)
            u = uncertainty[part].mul_(beta2).add_((size - m).abs(), alpha=1 - beta2)
            products += [(m * u).view(p.shape)] if score else []
            start += p.numel()
        if score:
            (A, B, E), r = products, params[i + 1].shape[1]
            row_A, row_E, d = shards[i : i + 3] if shards else (0, 0, B.shape[0])
            own = scores[first : first + r]
            own += B.sum(0) / d
            own[row_A : row_A + A.shape[0]] += A.sum(1) / A.shape[1]
            own[row_E : row_E + E.shape[0]] += E.flatten()
            first += r
    return scores


def _prune_cost(scores, lora_E, first, count):
    sort = scores.numel() * max(scores.numel() - 1, 1).bit_length()
    return Cost(sort, nbytes(scores, *lora_E) + nbytes(*lora_E) + scores.numel())


@define(
    "importance_prune_(Tensor scores, Tensor(a!)[] lora_E, int[] first, int count) -> Tensor",
    fake=lambda scores, lora_E, first, count: scores.new_empty(scores.shape, dtype=torch.bool),
    cost=_prune_cost,
    samples=lambda s: [(s.randn(s.r * (s.k + s.d + 1), dtype=s.acc).abs(), [s.randn(s.r)], [0], min(s.r, 2))],
)
def importance_prune_op(scores, lora_E, first, count):
    """Which triplets are kept [R] bool: those whose score exceeds the ``count``-th smallest, all for a count of 0; the
    E of the others becomes 0. lora_E[l] holds the triplets from first[l] on."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    pruned = scores <= scores.sort().values[count - 1]  # a NaN is not below anything: it stays
    for E, i in zip(lora_E, first, strict=True):
        E.masked_fill_(pruned[i : i + E.numel()].view(E.shape), 0)
    return ~pruned


# --- the regulariser -------------------------------------------------------------------------------------------------


def _stacks(matrices: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Indices and stacked values [n, r, m] of the matrices of one shape, in at least float32."""
    groups: dict[tuple, list[int]] = {}
    for i, X in enumerate(matrices):
        by_columns = X.stride(0) == 1 and X.stride(1) != 1  # the transpose of a contiguous B: stacked as it lies
        groups.setdefault((X.shape, X.dtype, X.device, by_columns), []).append(i)
    for (_, dtype, _, by_columns), members in groups.items():
        parts = [matrices[i].t() if by_columns else matrices[i] for i in members]
        stack = torch.stack(parts).to(accumulate_dtype(dtype))
        yield members, stack.transpose(1, 2) if by_columns else stack


class OrthogonalityFunction(Function):
    """mean ‖XXᵀ - I‖_F (or its square) over matrices [r, m]; saves r² numbers for each."""

    @staticmethod
    def forward(ctx, squared, *matrices):
        deviations, total = [], None
        for _, X in _stacks(matrices):
            G = torch.bmm(X, X.transpose(1, 2))
            G.diagonal(dim1=1, dim2=2).sub_(1)
            norm = torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True)
            share = (norm.square() if squared else norm).sum()
            total = share if total is None else total + share
            factor = 4.0 if squared else torch.where(norm > 0, 2 / norm, 0)
            deviations.append(G.mul_(factor))
        ctx.save_for_backward(*matrices, *deviations)
        ctx.count = len(matrices)
        return total / len(matrices)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        matrices, deviations = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads: list[torch.Tensor | None] = [None] * ctx.count
        for (members, X), G in zip(_stacks(matrices), deviations, strict=True):
            dX = torch.bmm(G, X).mul_((dy / ctx.count).to(G.dtype)).to(matrices[members[0]].dtype)
            for i, grad in zip(members, dX, strict=True):
                grads[i] = grad if ctx.needs_input_grad[i + 1] else None
        return None, *grads


# --- public functions ------------------------------------------------------------------------------------------------


def _layers(params, grads) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if not isinstance(params, Sequence) or not params or any(len(layer) != 3 for layer in params):
        raise ValueError(f"params: got {checks.describe(params)[:80]}, wanted a sequence of (lora_A, lora_B, lora_E)")
    flat = [p for layer in params for p in layer]
    if grads is not None:
        if len(grads) != len(params) or any(len(layer) != 3 for layer in grads):
            raise ValueError(f"grads: got {len(grads)} layers, wanted the {len(params)} of params, three tensors each")
        given = [g for layer in grads for g in layer]
    else:
        given = [p.grad for p in flat]
        if all(g is None for g in given):
            raise ValueError("grads: got parameters without .grad, wanted a call after backward and before zero_grad")
        given = [torch.zeros_like(p) if g is None else g for p, g in zip(flat, given, strict=True)]
    for i in range(len(params)):
        (A, B, E), names = flat[3 * i : 3 * i + 3], [f"params[{i}][{j}]" for j in range(3)]
        checks.tensor(names[0], A, "lora_A [r, in_features]", 2)
        checks.tensor(names[1], B, "lora_B [out_features, r]", 2)
        checks.tensor(names[2], E, "lora_E [r, 1] or [r]")
        if E.dim() not in (1, 2) or E.numel() != E.shape[0]:
            raise ValueError(f"{names[2]}: got {checks.describe(E)}, wanted lora_E [r, 1] or [r]")
        for name, p, g in zip(names, (A, B, E), given[3 * i :], strict=False):
            checks.device("params[0][0]", flat[0], **{name: p, f"the gradient of {name}": g})
            checks.no_narrowing(flat[0], **{name: p})
            if g.shape != p.shape or g.dtype != p.dtype:
                got = checks.describe(g)
                raise ValueError(f"grads[{i}]: got {got} for {name}, wanted its shape and dtype {checks.describe(p)}")
    return flat, given


def _check_shards(shards, params) -> list[int]:
    if shards is None:
        for i, (A, B, E) in enumerate(params):
            checks.size(f"params[{i}][0]", A, 0, B.shape[1], "the rank, columns of lora_B")
            checks.size(f"params[{i}][2]", E, 0, B.shape[1], "the rank, columns of lora_B")
        return []
    if len(shards) != len(params) or any(len(part) != 3 for part in shards):
        raise ValueError(
            f"shards: got {len(shards)} entries, wanted (first row of A, first of E, out_features) a layer"
        )
    for i, ((A, B, E), (row_A, row_E, d)) in enumerate(zip(params, shards, strict=True)):
        for name, first, rows, whole in (("A", row_A, A.shape[0], B.shape[1]), ("E", row_E, E.shape[0], B.shape[1])):
            checks.integer(f"shards[{i}]: first row of {name}", first, 0, whole - rows, f"{rows} of {whole} rows")
        checks.integer(f"shards[{i}]: out_features", d, max(B.shape[0], 1), None, "rows of the whole lora_B")
    return [int(number) for part in shards for number in part]


@calls(importance_update_op)
@torch.no_grad()
def adalora_importance(params, exp_avg, uncertainty, grads=None, *, beta1=0.85, beta2=0.85, shards=None, score=True):
    """Update AdaLoRA's running importance of every parameter of a model, in one operator call, and score the triplets.

    Args:
        params: (lora_A [r, k], lora_B [d, r], lora_E [r, 1] or [r]) of every layer; r, k, d may differ.
        exp_avg, uncertainty: Ī and Ū [N], float32 (float64 for float64), N the elements of ``params``; in place.
        grads: the gradients, like ``params``; None takes each ``.grad`` (one that is missing counts as zero).
        beta1, beta2: in (0, 1).
        shards: where ``params`` are parts of tensors split along the first dimension (FSDP): for each layer the first
            row held of A, the first of E, and out_features. The scores are then this part's share of a sum.
        score: False leaves the scores out, for the steps between two allocations.

    Returns the scores [R], R = Σ r, in exp_avg's dtype; [0] without ``score``. Sums in at least float32, in a fixed
    order. Raises TypeError/ValueError that name the argument. METHODS 1.6; AdaLoRA, arXiv:2303.10512.
    """
    flat, given = _layers(params, grads)
    numbers = _check_shards(shards, params)
    n, wide = sum(p.numel() for p in flat), accumulate_dtype(flat[0].dtype)
    for name, state in (("exp_avg", exp_avg), ("uncertainty", uncertainty)):
        checks.vector(name, state, n, "the elements of params")
        if state.dtype != wide or not state.is_contiguous():
            raise TypeError(f"{name}: got {checks.describe(state)}, wanted a contiguous vector in {wide}")
        checks.device("params[0][0]", flat[0], **{name: state})
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        checks.number(name, beta)
        if not 0 < beta < 1:
            raise ValueError(f"{name}: got {beta!r}, wanted a number in (0, 1)")
    return importance_update_op(exp_avg, uncertainty, flat, given, numbers, float(beta1), float(beta2), bool(score))


@calls(importance_prune_op)
@torch.no_grad()
def adalora_prune(lora_E, scores, count, *, first=None):
    """Zero the E of the ``count`` triplets of lowest score, and of those with the same score as the last of them.

    lora_E: [r, 1] or [r] of every layer, in place; scores [R]: :func:`adalora_importance`'s, a layer after the other;
    first: where each layer's triplets start in it, for parts of layers (None: they fill it). Returns which triplets are
    kept [R] bool, on the device; nothing waits for it. A count of 0 prunes nothing. Raises TypeError/ValueError naming
    the argument. METHODS 1.6; AdaLoRA, arXiv:2303.10512.
    """
    if not isinstance(lora_E, Sequence) or not lora_E:
        raise ValueError(f"lora_E: got {checks.describe(lora_E)[:80]}, wanted a sequence of tensors [r, 1] or [r]")
    checks.tensor("scores", scores, "[R]", 1)
    sizes = []
    for i, E in enumerate(lora_E):
        checks.tensor(f"lora_E[{i}]", E, "[r, 1] or [r]")
        checks.device("scores", scores, **{f"lora_E[{i}]": E})
        sizes.append(E.numel())
    if first is None:
        if sum(sizes) != scores.numel():
            raise ValueError(f"scores: got {scores.numel()}, wanted one for each of the {sum(sizes)} entries of lora_E")
        first = [sum(sizes[:i]) for i in range(len(sizes))]
    if len(first) != len(sizes):
        raise ValueError(f"first: got {len(first)} entries, wanted one for each of the {len(sizes)} layers")
    for i, (start, size) in enumerate(zip(first, sizes, strict=True)):
        checks.integer(f"first[{i}]", start, 0, scores.numel() - size, f"{size} of {scores.numel()} scores")
    checks.integer("count", count, 0, scores.numel(), "how many triplets to prune")
    return importance_prune_op(scores, list(lora_E), list(first), count)


def _regularised(model: nn.Module) -> list[torch.Tensor]:
    """A and Bᵀ of every trained AdaLoRA adapter of a model, ours or PEFT's."""
    found = []
    for module in model.modules():
        for name in getattr(module, "lora_E", ()):
            A, B = module.lora_A[name], module.lora_B[name]
            found += [X for X, trained in ((A, A.requires_grad), (B.t(), B.requires_grad)) if trained]
    if not found:
        raise ValueError(f"params: got a {type(model).__name__} that trains no AdaLoRA adapter, wanted one that does")
    return found


def orthogonality_loss(params, squared=False):
    """AdaLoRA's regulariser: the mean over matrices X [r, m] of ‖XXᵀ - I‖_F, a scalar to weigh and add to a loss.

    params: a sequence of matrices whose rows ought to be orthonormal (A as it is, B as ``B.t()``), or a model, of which
    every A and B of a trained AdaLoRA adapter is taken. squared: the paper's ‖XXᵀ - I‖²_F instead of the public code's
    form. The gradient is 2(XXᵀ - I)X/‖·‖, and 0 where the norm is 0. Computed in at least float32, also under autocast.
    Raises TypeError/ValueError that name the argument. METHODS 1.6; AdaLoRA, arXiv:2303.10512.
    """
    matrices = _regularised(params) if isinstance(params, nn.Module) else params
    if not isinstance(matrices, Sequence) or not matrices:
        raise ValueError(f"params: got {checks.describe(params)[:80]}, wanted a model or a sequence of matrices")
    for i, X in enumerate(matrices):
        checks.tensor(f"params[{i}]", X, "[r, m]", 2)
        checks.device("params[0]", matrices[0], **{f"params[{i}]": X})
    matrices = [X.full_tensor() if hasattr(X, "full_tensor") else X for X in matrices]  # FSDP2: whole rows are needed
    return apply(OrthogonalityFunction, matrices[0], bool(squared), *matrices)
