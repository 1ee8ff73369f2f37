"""How far a result may be from its oracle, and the checks that hold every function and operator to it.

Every oracle is a polynomial. Evaluated on absolute values, it and its gradients add up the absolute values of their
terms: the path. A result was rounded ``ROUNDINGS`` times to the working dtype, and summed over n terms in the
accumulation dtype. So each of its elements is off by at most

    (ROUNDINGS * eps(dtype) / 2 + n * eps(accumulate)) * |path|

Rounding errors are not correlated. So the Frobenius norm is off by at most the same with sqrt(n), relative to the
result itself or to the root of the sum of its squared terms (the oracle on squares), whichever is larger.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from instruments import results
from problems import Problem, cotangent
from tensors import accumulate, randn

from spectral_ops import _library

# the longest chain of roundings to the working dtype: a float32 parameter cast, h, h', the base product, the added
# update, the scaled factor of dx (g*dy or g*W), the dropped-out factor and the result
ROUNDINGS = 8


def evaluate(problem: Problem, dy: torch.Tensor, absolute: bool = False, power: int = 1):
    """The oracle's output and gradients in float64 on the CPU; with ``absolute``, the sums of their absolute terms
    to the given power."""

    def size(t):
        return abs(t) ** power if absolute else t

    v = {n: size(t.detach().cpu().double()).requires_grad_(t.requires_grad) for n, t in problem.inputs.items()}
    c = problem.constants
    if absolute:
        c = {n: size(t) if isinstance(t, (float, torch.Tensor)) else t for n, t in c.items()}
    y = problem.oracle(v, c)
    names = problem.trained()
    grads = torch.autograd.grad(y, [v[n] for n in names], size(dy.detach().cpu().double())) if names else []
    return y.detach(), dict(zip(names, grads, strict=True))


def assert_within_budget(name, got, want, path, dtype, length, roundings=ROUNDINGS, squares=None) -> None:
    """``got`` is ``want`` up to the roundings that its dtype and the length of its sums explain (see the top)."""
    got, want, path = (t.detach().cpu().double() for t in (got, want, path))
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, wanted {list(want.shape)}"
    if not want.numel():
        return
    eps, eps_acc = torch.finfo(dtype).eps, torch.finfo(accumulate(dtype)).eps
    floor = length * torch.finfo(dtype).smallest_normal * eps  # what underflow to subnormals may cost
    error = (got - want).abs()
    budget = (roundings * eps / 2 + length * eps_acc) * path.abs() + floor
    worst = (error / budget).nan_to_num(nan=float("inf")).max().item()
    assert worst <= 1, f"{name}: {worst:.3g} times its elementwise budget ({dtype}, sums of {length})"
    norm = want.norm() if squares is None else torch.maximum(want.norm(), squares.cpu().sum().sqrt())
    relative = (error.norm() / (norm + floor * want.numel() ** 0.5)).item()
    limit = roundings * eps / 2 + length**0.5 * eps_acc
    assert relative <= limit, f"{name}: relative error {relative:.3g}, budget {limit:.3g} ({dtype}, sums of {length})"


def check(problem: Problem, dy_layout: str = "contiguous") -> None:
    """Output and every gradient against the oracle, their dtypes, and that the inputs are left alone."""
    before = {n: t.detach().clone() for n, t in problem.inputs.items()}
    y = problem.call()
    assert y.dtype == problem.dtype
    dy = cotangent(problem, y, dy_layout)
    dy_before = dy.clone()
    names = problem.trained()
    grads = torch.autograd.grad(y, [problem.inputs[n] for n in names], dy) if names else []
    want, want_grads = evaluate(problem, dy)
    path, path_grads = evaluate(problem, dy, absolute=True)
    length = max(problem.inputs["x"].shape[-1], problem.out_features) + problem.tokens + 64
    squares, square_grads = evaluate(problem, dy, absolute=True, power=2)
    assert_within_budget("y", y, want, path, problem.dtype, length, squares=squares)
    for name, grad in zip(names, grads, strict=True):
        source = problem.inputs[name]
        assert grad.dtype == source.dtype, f"d{name}: {grad.dtype}, wanted its parameter's {source.dtype}"
        assert grad.device == source.device
        assert_within_budget(
            f"d{name}", grad, want_grads[name], path_grads[name], problem.dtype, length, squares=square_grads[name]
        )
    for name, t in problem.inputs.items():
        assert torch.equal(t.detach(), before[name]), f"{name} was overwritten"
    assert torch.equal(dy, dy_before), "dy was overwritten"


def check_batched_gradients(problem: Problem) -> None:
    """A batch of incoming gradients, in either of torch's ways, gives what each gives alone."""
    y, inputs = problem.call(), [problem.inputs[n] for n in problem.trained()]
    dys = randn(3, *y.shape, dtype=y.dtype, device=y.device)
    alone = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in dys]
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)
    for got in (batched, mapped):
        for grads, own in zip(got, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(grads, torch.stack(own))


def widened(args: tuple, absolute: bool = False) -> tuple:
    """The arguments with floating tensors (and numbers) in float64 on the CPU, optionally as absolute values."""
    wide = []
    for a in args:
        if isinstance(a, torch.Tensor):
            a = a.cpu().double() if a.is_floating_point() else a.cpu()
            a = a.abs() if absolute and a.is_floating_point() else a
        elif isinstance(a, float) and absolute:
            a = abs(a)
        wide.append(a)
    return tuple(wide)


def _squared(name: str, a):
    if name == "bias":  # already negated where it is subtracted
        return a if a is None else a * a.abs()
    if name == "scale" or (isinstance(a, torch.Tensor) and a.is_floating_point()):
        return a**2
    return a


def _softmax_path(name: str, args: tuple, want: list[torch.Tensor]) -> list[torch.Tensor]:
    """What rounding is relative to where exponentials are taken: the largest exponent of a row, per result."""
    logits, scale = args[0], args[-2]
    size = 1 + (logits * scale).abs().sum(1) if not logits.shape[1] else 1 + (logits * scale).abs().amax(1)
    if name == "target_logprob":
        return [size, size]
    targets, lse, dlogp = args[1:4]
    onehot = torch.nn.functional.one_hot(targets.clamp(min=0), max(logits.shape[1], 1))[:, : logits.shape[1]]
    p = (logits * scale - lse.unsqueeze(1)).exp()
    return [(onehot + p) * (scale * dlogp.abs() * (size + lse.abs())).unsqueeze(1)]


def _cayley_path(name: str, args: tuple, want: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an elimination of I + K and two products sum: entries do not cancel as those of a skew difference do."""
    eye = torch.eye(args[0].shape[-1], dtype=torch.float64)
    if name == "cayley_forward":
        M = (want[0] + eye).abs()
        return [1 + M @ (eye + (args[0] - args[0].mT).abs() / 2) @ M / 2]
    M = (args[0] + eye).abs()
    V = M @ args[1].abs().mT @ M
    return [(V + V.mT) / 4]


def check_operator(operator: _library.Operator, overload: Callable, args: tuple) -> list[torch.Tensor]:
    """One implementation of an operator against its reference in float64, within the error budget; its results."""
    reference = operator.reference
    got = results(operator, overload, args)
    want = results(operator, reference, widened(args))
    absolute = widened(args, absolute=True)
    if operator.name == "lowrank_backward" and absolute[6] is not None:
        absolute = (*absolute[:6], -absolute[6], *absolute[7:])  # Σ dy*(y - bias): the terms' absolute sum
    path = results(operator, reference, absolute)
    if operator.stem == "policy":
        path = _softmax_path(operator.name, widened(args), want)
    if operator.stem == "cayley":
        path = _cayley_path(operator.name, widened(args), want)
    if operator.name.startswith("column_norm"):  # rounding of c is relative to the rows' absolute sums
        path = [p.clamp_min(1e-30) for p in path]
    squares = [None] * len(path)
    if operator.name not in (
        "column_norm",
        "column_norm_cached_",
        "magnitude_grad",
        "target_logprob",
        "softmax_gradient_",
    ):  # polynomials
        names = [a.name for a in operator.default._schema.arguments]
        squares = results(operator, reference, tuple(map(_squared, names, absolute)))
    if operator.stem == "cayley":
        squares = [p.square() for p in path]
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
    if operator.name == "magnitude_grad":
        dtype = args[1].dtype
    length = sum(max(a.shape) for a in args if isinstance(a, torch.Tensor) and a.dim() == 2) + 16
    assert len(got) == len(want)
    for i, (g, w, p, q) in enumerate(zip(got, want, path, squares, strict=True)):
        # float32 accumulators handed out by a half-precision operator are not rounded to half precision
        out_dtype = g.dtype if g.dtype != torch.float64 else dtype
        assert_within_budget(f"{operator.name}[{i}]", g, w, p, out_dtype, length, roundings=3, squares=q)
    return got
