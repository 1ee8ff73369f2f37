"""Sparse matrices to test on, and the checks that the sparse operators and RoSA's layer share."""

from __future__ import annotations

import functools

import pytest
import torch
from tensors import randn, sparse_pattern
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import spectral_ops
from spectral_ops import CSR

KINDS = ["empty rows", "nothing", "one dense row", "one dense column", "everything", "last"]


def int32(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def dense_of(values, row_offsets, columns, shape) -> torch.Tensor:
    """S, entry by entry."""
    S = torch.zeros(shape, dtype=values.dtype)
    for row in range(shape[0]):
        for p in range(int(row_offsets[row]), int(row_offsets[row + 1])):
            S[row, int(columns[p])] = values[p]
    return S


def random_csr(d, k, dtype=torch.float64, density=0.3, trained=False) -> CSR:
    offsets, columns = sparse_pattern(d, k, density=density)
    return CSR(randn(columns.numel(), dtype=dtype).requires_grad_(trained), offsets, columns, (d, k))


def unsorted_csr(dtype=torch.float64, trained=False) -> CSR:
    values = randn(5, dtype=dtype).requires_grad_(trained)
    return CSR(values, int32([0, 3, 3, 5]), int32([3, 0, 2, 4, 1]), (3, 5), sorted=False)


def mask_of(kind, d=12, k=10) -> torch.Tensor:
    """Which entries a pattern of this kind has."""
    mask = torch.zeros(d, k, dtype=torch.bool)
    if kind == "empty rows":
        mask[3::4, ::3] = True
    elif kind == "one dense row":
        mask[7] = True
    elif kind == "one dense column":
        mask[:, 4] = True
    elif kind == "everything":
        mask[:] = True
    elif kind == "last":
        mask[-1, -1] = True
    return mask


def agree(got, want, inputs, dy) -> None:
    """The same values and the same gradients of ``inputs``."""
    torch.testing.assert_close(got, want)
    right = torch.autograd.grad(want, inputs, dy, retain_graph=True)
    for a, b in zip(torch.autograd.grad(got, inputs, dy), right, strict=True):
        torch.testing.assert_close(a, b)


def step(function, inputs, run=lambda function, *inputs: function(*inputs)):
    """What it returns and its gradients, dropout drawn from one state of the generator."""
    torch.manual_seed(5)
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(lambda *inputs: function(*inputs).sin().square(), *inputs)
    return [y, *torch.autograd.grad(y.float().sum(), inputs)]


def check_selective_checkpointing(function, inputs, overwrites=False) -> None:
    """Whatever a policy keeps, plain bit for bit; an in-place sum of a kept tensor must raise."""
    want = step(function, inputs)
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mul.Tensor)

    def policy(keeps, ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE

    for keeps in (products.__contains__, lambda op: op.namespace == "spectral_ops", lambda op: False, lambda op: True):
        contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, keeps))
        run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
        if overwrites and keeps(torch.ops.aten.mul.Tensor):
            with pytest.raises(RuntimeError, match="has been mutated"):
                step(function, inputs, run)
            continue
        got = step(function, inputs, run)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_batched_gradients(function, inputs) -> None:
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    dys = randn(4, *y.shape)
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for got, want in zip(batched, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


def check_a_backend_that_cannot_run(function, inputs) -> None:
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    with spectral_ops.use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable):
        function(*inputs)
    y = function(*inputs)
    with spectral_ops.use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable):
        torch.autograd.grad(y, inputs[1], torch.ones_like(y))
