"""Arguments for every operator and layer operator, for every overload, dtype and device."""

from __future__ import annotations

import contextlib
import functools

import torch
from problems import FAMILIES, cotangent
from tensors import TYPICAL, copied, randn
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_ops
from spectral_ops import _library
from spectral_ops.bench.samples import arguments
from spectral_ops.functional.float8 import float8_column_norm_op

# those that take lists of tensors have tests of their own
OPERATOR_NAMES = [name for name, operator in sorted(_library.OPERATORS.items()) if "[]" not in operator.schema]
SIZES = [{}, {"T": 1, "r": 1}, {"T": 70, "k": 131, "d": 66, "r": 17}]


def samples_of(name: str, *, dtype=torch.float32, device="cpu", T=6, k=21, d=34, r=5, seed=0) -> list[tuple]:
    """An operator's own sample arguments, at the tests' sizes."""
    return list(arguments(name, T, d, k, r, dtype, device, seed, density=0.3))


class Quiet(TorchDispatchMode):
    """A dispatch mode that changes nothing; while it is on, no layer overwrites what it is given."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@functools.cache
def _layer_calls(dtype: torch.dtype, shape: tuple) -> dict[str, list[tuple]]:
    torch.manual_seed(0)
    calls: dict[str, list[tuple]] = {}

    def record(operator, *args):
        calls.setdefault(operator.name, []).append(
            tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in copied(args))
        )
        return call(operator, *args)

    call = _library.LayerOperator.__call__
    _library.LayerOperator.__call__ = record
    try:
        for family in FAMILIES.values():
            for mode in (contextlib.nullcontext(), Quiet())[: 2 if "update" in family.name else 1]:
                for bias in (None, "trained"):
                    problem = family.build(shape, dtype, **({} if family.name == "block-sum" else {"bias": bias}))
                    with mode:
                        y = problem.call()
                    torch.autograd.grad(y, [problem.inputs[n] for n in problem.trained()], cotangent(problem, y))
        weight = randn(12, 16, dtype=dtype)
        csr = spectral_ops.CSR.from_dense(randn(12, 16, dtype=dtype).clamp_min(0))
        for mode, n in (("col", 3), ("row", 4)):
            spectral_ops.bat_weight(weight, randn(n, 4, 4, dtype=dtype).requires_grad_(), mode=mode).sum().backward()
        csr = csr.with_values(csr.values.detach().requires_grad_())
        spectral_ops.csr_add(weight, csr).sum().backward()
        x, bias = randn(3, 5, 16, dtype=dtype).requires_grad_(), randn(12, dtype=dtype).requires_grad_()
        narrow, scale = weight.to(torch.float8_e4m3fn), torch.arange(1.0, 7.0).view(2, 3)
        spectral_ops.float8_linear(x, narrow, scale, bias, block_size=(7, 6)).sum().backward()
        for mode in (contextlib.nullcontext(), Quiet()):
            with mode:
                _updates(dtype)
        _rotations(dtype)
        float8_column_norm_op(narrow, scale, randn(4, 16, dtype=dtype), randn(12, 4, dtype=dtype), 0.5, 7, 6)
    finally:
        _library.LayerOperator.__call__ = call
    return calls


def _updates(dtype: torch.dtype) -> None:
    """Updates of convolutions and embeddings, as LoRA and as DoRA, forward and backward."""
    W, A = (randn(n, 3, 3, 3, dtype=dtype, fan=27) for n in (6, 2))
    B, bias, ids = randn(6, 2, dtype=dtype).requires_grad_(), randn(6, dtype=dtype), torch.tensor([[1, 4], [4, 0]])
    E, rows = randn(5, 6, dtype=dtype), randn(2, 5, dtype=dtype).requires_grad_()
    magnitude = randn(6, dtype=dtype).add_(3).requires_grad_()
    for last, p, dora in ((False, 0.0, False), (True, 0.3, False), (False, 0.0, True), (True, 0.0, True)):
        x = randn(2, 3, 5, 4, dtype=dtype)
        x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
        options = {"scale": 0.5, "stride": (2, 1), "padding": 1}
        if dora:
            norm = spectral_ops.column_norm(W.flatten(1), A.flatten(1), B, 0.5)
            options |= {"magnitude": magnitude, "norm": norm, "weight": W, "bias": bias}
        out = torch.nn.functional.conv2d(x, W, None if dora else bias, (2, 1), 1)
        kernel = A.clone().requires_grad_()
        y = spectral_ops.conv_update(out, x, kernel, B, **options, dropout_p=p, training=True)
        y.backward(torch.ones_like(y))
        options = {"scale": 0.5, "padding_idx": 4 if last else None}
        if dora:
            norm = spectral_ops.column_norm(E.t(), rows, B, 0.5)
            options |= {"magnitude": magnitude, "norm": norm, "weight": E}
        spectral_ops.embedding_update(E[ids], ids, rows, B, **options).sum().backward()


def _rotations(dtype: torch.dtype) -> None:
    """Rotated and reflected layers, forward and backward, in each form of their parameters."""
    W, bias, scale = randn(6, 16, dtype=dtype), randn(6, dtype=dtype).requires_grad_(), randn(6, dtype=dtype)
    for blocks, terms in (((4, 6), 0), ((4, 6), 5), ((1, 6), 3), ((1, 4, 4, 4), 0), ((2, 4, 4, 4), 0)):
        x, blocks = randn(3, 5, 16, dtype=dtype).requires_grad_(), randn(*blocks, dtype=dtype, fan=9).requires_grad_()
        s = scale.clone().requires_grad_() if blocks.dim() == 4 else None
        spectral_ops.rotation_linear(x, W, blocks, bias, scale=s, terms=terms).sum().backward()
        spectral_ops.rotate(x, blocks, terms=terms).sum().backward()
    for orthonormal in (False, True):
        x, u = randn(3, 5, 16, dtype=dtype).requires_grad_(), randn(16, 3, dtype=dtype, fan=16).requires_grad_()
        spectral_ops.householder_linear(x, W, u, bias, orthonormal=orthonormal).sum().backward()


def layer_samples(name: str, dtype: torch.dtype = torch.float32, shape: tuple = TYPICAL) -> list[tuple]:
    """Arguments of a layer operator: those of every family of problems, forward and backward, in place and not."""
    return _layer_calls(dtype, shape)[name]
