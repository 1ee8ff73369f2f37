"""Losses of preference and policy training (METHODS 1.8).

    log π(target) = z_target - logsumexp(z),  z = hidden · headᵀ / temperature
    backward, p = softmax(z):  dz = (onehot - p) · dlogp / temperature     dhidden = dz · head     dhead = dzᵀ hidden

A chunk of tokens at a time, so that no [T, V] tensor exists: a chunk's logits are the library's product, reduced to two
numbers per token. Under a frozen head forward also overwrites them with their gradient for dlogp = 1 and multiplies it
with the head, so that backward is one product by dlogp per element; saved: that unit gradient [T, k] and targets. Where
the head trains, backward computes the logits again; saved: hidden, targets, logsumexp [T].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd import Function

from spectral_ops._library import Cost, accumulate_dtype, calls, define, nbytes
from spectral_ops.core import checks
from spectral_ops.core.autograd import apply, autocast_arguments, backward_pass, mm, rows

__all__ = ["kl_to_anchor", "preference_loss", "token_logprobs"]

LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of one chunk: enough rows for the library's full speed
TANGENT = 10.0  # k3 goes on along its tangent from this Δ on


# --- operators -------------------------------------------------------------------------------------------------------


def _logprob_cost(logits, targets, scale, ignore_index):
    out = 2 * targets.numel() * accumulate_dtype(logits.dtype).itemsize
    return Cost(4 * logits.numel(), nbytes(logits, targets) + out)


def _rows_like(logits):
    return logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits.dtype))


def _target_samples(s, ignored):
    row = torch.arange(s.T, device=s.device)
    return torch.where(row % 4 == 3, ignored, 5 * row % s.d) if s.d else torch.full_like(row, ignored)


def _logprob_samples(s):
    logits = s.randn(s.T, s.d, scale=6)
    yield logits, _target_samples(s, -100), 1.0, -100
    yield s.rows(logits), _target_samples(s, -7), 0.5, -7


@define(
    "target_logprob(Tensor logits, Tensor targets, float scale, int ignore_index) -> (Tensor, Tensor)",
    fake=lambda logits, targets, scale, ignore_index: (_rows_like(logits), _rows_like(logits)),
    cost=_logprob_cost,
    samples=_logprob_samples,
)
def target_logprob_op(logits, targets, scale, ignore_index):
    """(log-probability of targets, logsumexp), both [n] in float32 (float64 for float64), of scale * logits [n, V].

    targets [n] int64; 0 where it is ignore_index, NaN where it is otherwise outside [0, V).
    """
    z = logits.to(accumulate_dtype(logits.dtype)) * scale
    lse = z.logsumexp(1)
    inside = (targets >= 0) & (targets < logits.shape[1])
    if logits.shape[1]:
        picked = z.gather(1, torch.where(inside, targets, 0).unsqueeze(1)).squeeze(1)
        logp = torch.where(inside, picked - lse, float("nan"))
    else:
        logp = torch.full_like(lse, float("nan"))
    return torch.where(targets == ignore_index, 0.0, logp), lse


def _gradient_cost(logits, targets, logsumexp, dlogp, scale, ignore_index):
    return Cost(4 * logits.numel(), 2 * nbytes(logits) + nbytes(targets, logsumexp, dlogp))


def _gradient_samples(s):
    for scale, ignored, laid_out in ((0.5, -100, torch.clone), (1.0, -7, torch.clone), (0.5, -7, s.rows)):
        logits = s.randn(s.T, s.d, scale=6)
        lse = (scale * logits.to(s.acc)).logsumexp(1)
        yield laid_out(logits), _target_samples(s, ignored), lse, s.randn(s.T, dtype=s.acc), scale, ignored


@define(
    "softmax_gradient_(Tensor(a!) logits, Tensor targets, Tensor logsumexp, Tensor dlogp, float scale, "
    "int ignore_index) -> ()",
    fake=lambda logits, targets, logsumexp, dlogp, scale, ignore_index: None,
    cost=_gradient_cost,
    samples=_gradient_samples,
)
def softmax_gradient_op(logits, targets, logsumexp, dlogp, scale, ignore_index):
    """logits [n, V] becomes scale * dlogp * (onehot(targets) - exp(scale * logits - logsumexp)), in logits' dtype.

    targets [n] int64, logsumexp and dlogp [n] float32 (float64 for float64) as target_logprob has them; a row whose
    target is ignore_index becomes 0, one whose target is otherwise outside [0, V) NaN.
    """
    acc, V = accumulate_dtype(logits.dtype), logits.shape[1]
    p = (logits.to(acc) * scale - logsumexp.unsqueeze(1)).exp()
    onehot = targets.unsqueeze(1) == torch.arange(V, device=logits.device)
    factor = torch.where((targets >= 0) & (targets < V), scale * dlogp, float("nan")).unsqueeze(1)
    gradient = (onehot.to(acc) - p) * factor
    logits.copy_(gradient.masked_fill((targets == ignore_index).unsqueeze(1), 0.0))


# --- autograd --------------------------------------------------------------------------------------------------------


def chunk_rows(T: int, V: int, itemsize: int, device_type: str) -> int:
    """Tokens per chunk: as many as LOGITS_BYTES holds the logits of, in chunks of nearly one size; at least one."""
    most = max(LOGITS_BYTES.get(device_type, LOGITS_BYTES["cpu"]) // max(V * itemsize, 1), 1)
    chunks = max(-(-T // most), 1)
    return max(-(-T // chunks), 1)


def _parts(T: int, chunk: int) -> list[slice]:
    """[0, T) in chunks. Compiled for any T, the code depends on their number alone."""
    return [slice(i * chunk, min((i + 1) * chunk, T)) for i in range((T + chunk - 1) // chunk)]


def _logit_chunks(hidden, head, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (tokens, logits) per chunk, the logits not yet scaled by the temperature. All chunks share one buffer."""
    T = hidden.shape[0]
    logits = hidden.new_empty(min(chunk, T), head.shape[0])
    for part in _parts(T, chunk):
        h = hidden[part]
        yield part, torch.mm(h, head.t(), out=logits[: h.shape[0]])


class FrozenHeadFunction(Function):
    """[T] log-probabilities of targets [T] under hidden [T, k] and a head [V, k] that has no gradient."""

    @staticmethod
    def forward(ctx, hidden, head, targets, scale, ignore_index, chunk):
        T = hidden.shape[0]
        logp = hidden.new_empty(T, dtype=accumulate_dtype(hidden.dtype))
        unit = torch.empty_like(hidden, memory_format=torch.contiguous_format)  # the gradient where dlogp is 1
        ones = torch.ones_like(logp)
        for part, z in _logit_chunks(hidden, head, chunk):
            logp[part], lse = target_logprob_op(z, targets[part], scale, ignore_index)
            softmax_gradient_op(z, targets[part], lse, ones[part], scale, ignore_index)
            torch.mm(z, head, out=unit[part])
        ctx.save_for_backward(unit, targets)
        ctx.ignore_index = ignore_index
        return logp

    @staticmethod
    @backward_pass
    def backward(ctx, dlogp):
        unit, targets = ctx.saved_tensors
        factor = dlogp.masked_fill(targets == ctx.ignore_index, 0.0).unsqueeze(1)
        return torch.mul(unit, factor, out=torch.empty_like(unit)), None, None, None, None, None


class TokenLogprobsFunction(Function):
    """[T] log-probabilities of targets [T] under hidden [T, k] and head [V, k]."""

    @staticmethod
    def forward(ctx, hidden, head, targets, scale, ignore_index, chunk):
        logp = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))
        lse = torch.empty_like(logp)
        for part, z in _logit_chunks(hidden, head, chunk):
            logp[part], lse[part] = target_logprob_op(z, targets[part], scale, ignore_index)
        ctx.save_for_backward(hidden, head, targets, lse)
        ctx.scale, ctx.ignore_index, ctx.chunk = scale, ignore_index, chunk
        return logp

    @staticmethod
    @backward_pass
    def backward(ctx, dlogp):
        hidden, head, targets, lse = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        dlogp = dlogp.contiguous()
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        wide = accumulate_dtype(head.dtype)
        dhead = torch.zeros_like(head, dtype=wide, memory_format=torch.contiguous_format) if need_head else None
        for part, z in _logit_chunks(hidden, head, ctx.chunk):
            softmax_gradient_op(z, targets[part], lse[part], dlogp[part], ctx.scale, ctx.ignore_index)
            if need_hidden:
                torch.mm(z, head, out=dhidden[part])
            if need_head and head.dtype == wide:
                dhead.addmm_(z.t(), hidden[part])
            elif need_head:
                dhead += mm(z.t(), hidden[part], wide)
        return dhidden, dhead.to(head.dtype) if need_head else None, None, None, None, None


class K3Function(Function):
    """exp(Δ) - 1 - Δ for Δ = logp_anchor - logp; its derivative by logp is 1 - exp(Δ)."""

    @staticmethod
    def forward(ctx, logp, logp_anchor):
        delta = logp_anchor - logp
        ctx.save_for_backward(delta)
        near = torch.zeros_like(delta)  # Δ² (1/2 + Δ/6 + ...) keeps the digits that exp(Δ) - 1 - Δ cancels
        for n in range(12, 1, -1):
            near = (near * delta + 1) / n
        near = near * delta * delta
        capped = delta.clamp(max=TANGENT)
        far = capped.expm1() - capped + (delta - capped) * torch.expm1(delta.new_tensor(TANGENT))
        return torch.where(delta.abs() < 0.1, near, far)

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        (delta,) = ctx.saved_tensors
        return -delta.clamp(max=TANGENT).expm1() * dy, None


# --- public functions ------------------------------------------------------------------------------------------------


def _check_targets(hidden, targets, V: int, ignore_index: int) -> None:
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets: got {checks.describe(targets)}, wanted a tensor [...] of int64 token numbers")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {checks.describe(targets)}, wanted int64 token numbers")
    if targets.shape != hidden.shape[:-1]:
        wanted = list(hidden.shape[:-1])
        raise ValueError(f"targets: got {checks.describe(targets)}, wanted the leading dimensions of hidden {wanted}")
    checks.device("hidden", hidden, targets=targets)
    if torch.compiler.is_compiling() or targets.device.type != "cpu" or not targets.numel():
        return
    wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if wrong.any():
        got = targets[wrong][0].item()
        raise IndexError(f"targets: got {got}, wanted token numbers in [0, {V}) or ignore_index ({ignore_index})")


@calls(target_logprob_op, softmax_gradient_op)
def token_logprobs(hidden, lm_head_weight, targets, *, chunk=None, ignore_index=-100, temperature=1.0):
    """Log-probability of each target token, log softmax(hidden · headᵀ / temperature)[target]; no [T, V] in memory.

    Args:
        hidden: [..., k], the last hidden states, float64/float32/bfloat16/float16; any strides, may be empty.
        lm_head_weight: the head [V, k] in hidden's dtype (autocast casts both); may be trained, or tied embeddings.
        targets: [...] int64 token numbers below V, already shifted against hidden. On the CPU one out of range raises
            IndexError; elsewhere, where looking would stop the device, and while compiling its result and gradient are
            NaN.
        chunk: tokens whose logits exist at a time; by default as many as fit 32 MiB (CUDA: 256 MiB).
        ignore_index: targets that are not there (padding): their log-probability is 0 and has no gradient.
        temperature: divides the logits, as in sampling.

    Returns [...] float32 (float64 for float64). Logits are rounded to hidden's dtype, as the model's own head rounds
    them; everything after is float32. Differentiable in hidden and, where it requires grad, in the head, whose gradient
    is summed in float32 over the chunks.

    Where hidden requires grad and the head does not, forward already forms hidden's gradient up to the factor of each
    token, and backward multiplies by that: as many products with the head as with all logits in memory. It saves that
    unit gradient [..., k] in hidden's dtype, and targets; hidden and the head are free. Where the head trains, and in
    float16, whose small probabilities need the loss scale that comes with the backward pass, backward computes the
    logits once more; saved: hidden, the head, targets and logsumexp [...].

    Raises TypeError, ValueError or IndexError that name the argument. METHODS 1.8; chunking and the gradient in forward
    as in Liger-Kernel, arXiv:2410.10989.
    """
    hidden, lm_head_weight = autocast_arguments(hidden, lm_head_weight)
    checks.tensor("hidden", hidden, "[..., k]")
    if hidden.dim() < 1:
        raise ValueError(f"hidden: got {checks.describe(hidden)}, wanted at least one dimension [..., k]")
    checks.tensor("lm_head_weight", lm_head_weight, "[V, k]", 2)
    checks.size("lm_head_weight", lm_head_weight, 1, hidden.shape[-1], "the last dimension of hidden")
    checks.device("hidden", hidden, lm_head_weight=lm_head_weight)
    checks.same_dtype("hidden", hidden, lm_head_weight=lm_head_weight)
    checks.number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature: got {temperature!r}, wanted a number above 0")
    checks.integer("ignore_index", ignore_index, -(2**63), None, "a target that is not there")
    V = lm_head_weight.shape[0]
    _check_targets(hidden, targets, V, ignore_index)
    h = rows(hidden)
    if chunk is None:
        chunk = chunk_rows(h.shape[0], V, h.element_size(), h.device.type)
    checks.integer("chunk", chunk, 1, None, "tokens per chunk")
    args = h, lm_head_weight, targets.reshape(-1), 1.0 / temperature, ignore_index, chunk
    forms_gradient = (
        torch.is_grad_enabled() and h.requires_grad and not lm_head_weight.requires_grad and h.dtype != torch.float16
    )
    function = FrozenHeadFunction if forms_gradient else TokenLogprobsFunction
    return apply(function, hidden, *args).reshape(targets.shape)


def kl_to_anchor(logp, logp_anchor, *, estimator="k3"):
    """KL(π‖anchor) per token, estimated from the log-probabilities of tokens that were sampled from π.

    logp and logp_anchor [...], one floating dtype. With Δ = logp_anchor - logp: "k1" is -Δ (unbiased, of either sign);
    "k3" is exp(Δ) - 1 - Δ (unbiased, never negative, of less variance), by its series near 0, where the
    difference would cancel. From Δ = 10 on, k3 goes on along its tangent, so that it and its gradient stay finite (at
    most e¹⁰ - 1 in size) where one token would outweigh the batch. Returns [...] in that dtype, differentiable in logp;
    the anchor is a constant. Raises TypeError/ValueError naming the argument. METHODS 1.8; J. Schulman, "Approximating
    KL Divergence" (2020).
    """
    checks.tensor("logp", logp, "[...]")
    checks.tensor("logp_anchor", logp_anchor, "[...]")
    if logp_anchor.shape != logp.shape:
        raise ValueError(
            f"logp_anchor: got {checks.describe(logp_anchor)}, wanted the shape of logp {list(logp.shape)}"
        )
    checks.device("logp", logp, logp_anchor=logp_anchor)
    checks.same_dtype("logp", logp, logp_anchor=logp_anchor)
    if estimator == "k1":
        return logp - logp_anchor.detach()
    if estimator != "k3":
        raise ValueError(f'estimator: got {estimator!r}, wanted "k1" or "k3"')
    return K3Function.apply(logp, logp_anchor.detach())


def preference_loss(chosen, rejected, *, reduction="mean"):
    """Bradley-Terry loss -log σ(chosen - rejected) of pairs of rewards, as softplus(rejected - chosen).

    chosen and rejected [...], one floating dtype; the difference is taken in at least float32. reduction: "mean" over
    all pairs (the default), "sum", or "none" for one loss per pair [...]. Returns float32 (float64 for float64),
    differentiable in both. Raises TypeError/ValueError naming the argument. METHODS 1.8; arXiv:1706.03741.
    """
    checks.tensor("chosen", chosen, "[...]")
    checks.tensor("rejected", rejected, "[...]")
    if rejected.shape != chosen.shape:
        raise ValueError(f"rejected: got {checks.describe(rejected)}, wanted the shape of chosen {list(chosen.shape)}")
    checks.device("chosen", chosen, rejected=rejected)
    checks.same_dtype("chosen", chosen, rejected=rejected)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}, wanted "mean", "sum" or "none"')
    acc = accumulate_dtype(chosen.dtype)
    loss = -F.logsigmoid(chosen.to(acc) - rejected.to(acc))  # softplus, without its switch to a line
    return loss if reduction == "none" else getattr(loss, reduction)()
