"""Arguments for every operator and layer operator, for every overload, dtype and device."""

from __future__ import annotations

import contextlib
import functools

import torch
from oracles import weight_norm
from problems import FAMILIES, cotangent
from tensors import TYPICAL, accumulate, copied, laid_out, randn, sparse_pattern
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_ops
from spectral_ops import _library


def _orthogonal(X: torch.Tensor) -> torch.Tensor:
    """The Cayley transform of X [n, r, r] in float64."""
    X, eye = X.cpu().double(), torch.eye(X.shape[-1], dtype=torch.float64)
    return torch.linalg.inv(eye + (X - X.mT) / 2) * 2 - eye


def operator_samples(dtype=torch.float32, device="cpu", T=6, k=21, d=34, r=5) -> dict[str, list[tuple]]:
    """Arguments for every operator, None options included."""
    acc = accumulate(dtype)

    def make(*shape, dtype=dtype, fan=1):
        return randn(*shape, dtype=dtype, device=device, fan=fan)

    x, dy, y = make(T, k), make(T, d), make(T, d)
    weight, A, B, h = make(d, k, fan=k), make(r, k, fan=k), make(d, r, fan=r), make(T, r)
    A32, B32 = make(r, k, dtype=acc, fan=k), make(d, r, dtype=acc, fan=r)
    u, bias = make(T, r), make(d)
    g, shift = 1 + 0.3 * make(d, dtype=acc), make(d, dtype=acc)
    seed = torch.tensor([0x1234_5678_9ABC], device=device)
    norm = weight_norm(weight, A, B, 0.5).to(acc)
    stamp = torch.zeros(2, dtype=torch.int64, device=device)  # of no A and B: the norm must be computed
    small = g.clone()
    small[::3] *= 2.0**-20
    blocks = torch.tensor([0, 1, 4, 5, 12, k], dtype=torch.int32, device=device)  # uneven shards of k = 21 (r = 5)
    out_blocks = torch.tensor([0, 7, 8, 20, 30, d], dtype=torch.int32, device=device)
    wide = laid_out(x, "rows")

    nd, nk = max(d // max(r, 1), 1), max(k // max(r, 1), 1)  # blocks of Bat, and the sizes they fill
    dr, kr = nd * r, nk * r
    W_bat, G_bat, x_bat, dy_bat = make(dr, kr, fan=kr), make(dr, kr), make(T, kr), make(T, dr)
    col, row, col32 = make(nd, r, r, fan=r), make(nk, r, r, fan=r), make(nd, r, r, dtype=acc, fan=r)
    dB = torch.zeros(nd, r, r, dtype=acc, device=device)

    offsets, columns = sparse_pattern(d, k, device)
    nnz = columns.numel()
    values, values32, order = make(nnz), make(nnz, dtype=acc), torch.randperm(nnz).to(device, torch.int32)
    half = offsets[d // 2 :].clone()  # the offsets of the lower half

    logits, token = 6 * y, torch.arange(T, device=device)
    targets = torch.where(token % 4 == 3, -7, token * 5 % d) if d else token.new_full((T,), -7)  # -7: ignored
    lse, lse_half, dlogp = logits.to(acc).logsumexp(1), (0.5 * logits.to(acc)).logsumexp(1), make(T, dtype=acc)
    As, Bs = make(4, r, k, fan=k), make(4, d, r, fan=r)
    groups = torch.randperm(T).to(device), torch.tensor([T // 7, T // 3, T // 3, T // 2, T - T // 5], device=device)
    alone = groups[0], torch.tensor([0, T, T, T, T], device=device)

    X, dQ = make(min(T, 3), r, r), make(min(T, 3), r, r, dtype=acc)
    Q = _orthogonal(X).to(dQ)
    return {
        "cayley_forward": [(X,), (X.mT,)],
        "cayley_backward": [(Q, dQ), (Q.mT, dQ[:1].expand_as(dQ))],
        "segment_project": [
            (x, As, *groups),
            (x, As, *alone),
            (wide, As.transpose(1, 2).contiguous().transpose(1, 2), *groups),
        ],
        "segment_lift_": [
            (y.clone(), h, Bs, *groups),
            (laid_out(y, "rows"), laid_out(h, "rows"), Bs.transpose(0, 1).contiguous().transpose(0, 1), *alone),
        ],
        "segment_outer": [(u, x, *groups), (laid_out(u, "rows"), wide, *alone)],
        "bat_weight_": [
            (torch.zeros_like(W_bat), W_bat, col, False, False),
            (torch.zeros_like(W_bat), W_bat, row, True, False),
            (torch.zeros(dr, kr, dtype=acc, device=device), laid_out(W_bat, "rows"), col32, False, True),
            (torch.zeros_like(W_bat), laid_out(W_bat, "transposed"), col32, False, False),
        ],
        "bat_matmul": [
            (x_bat, W_bat, col, False),
            (dy_bat, W_bat, col32, True),
            (laid_out(x_bat, "rows"), laid_out(W_bat, "transposed"), col32, False),
        ],
        "bat_contract_": [(dB, W_bat, G_bat), (dB, laid_out(W_bat, "transposed"), G_bat.to(acc))],
        "bat_mix": [(x_bat, row), (laid_out(x_bat, "rows"), row.to(acc))],
        "bat_mix_backward_": [
            (make(T, kr), u, x_bat, row, True, True),
            (make(T, kr), u, x_bat, row.to(acc), True, False),
            (make(T, kr), u, laid_out(x_bat, "rows"), row, False, True),
        ],
        "csr_scatter_": [
            (weight.clone(), values, offsets, columns, True),
            (laid_out(weight, "transposed"), values32, offsets, columns, False),
        ],
        "csr_gather_": [
            (values32.clone(), weight, offsets, columns),
            (values.clone(), laid_out(weight[d // 2 :], "transposed"), half, columns),
        ],
        "csr_spmm_": [
            (y.clone(), x, values, offsets, columns, None),
            (laid_out(y, "rows"), wide, values32, offsets, columns, order),
        ],
        "csr_sddmm": [(dy, x, offsets, columns), (laid_out(dy, "rows"), wide, offsets, columns)],
        "target_logprob": [
            (logits, targets, 1.0, -7),
            (laid_out(logits, "rows"), targets, 0.5, -7),
        ],
        "softmax_gradient_": [
            (logits.clone(), targets, lse, dlogp, 1.0, -7),
            (laid_out(logits, "rows"), targets, lse_half, dlogp, 0.5, -7),
        ],
        "lowrank_matmul": [
            (x, weight, h, B, 0.5, None, None),
            (x, weight, h, B, 0.5, g, bias),
            (wide, laid_out(weight, "transposed"), h, B, -2.0, None, bias),
        ],
        "lowrank_update_": [
            (y, h, B, 0.5, None, None),
            (y, h, B, 0.5, g, None),
            (y, h, B, -1.5, g, shift),
            (laid_out(y, "rows"), h, B, 0.5, None, shift),
        ],
        "lowrank_backward": [
            (dy, h, B, 0.5, None, None, None, True, True, True, False),
            (dy, h, B, 0.5, g, y, bias, True, True, True, True),
            (dy, h, B, 0.5, g, y, None, True, False, False, False),
            (dy, h, B, 0.5, g, None, None, False, True, False, True),
            (laid_out(dy, "rows"), h, B, -0.5, g, laid_out(y, "rows"), bias, True, True, False, True),
            (laid_out(dy, "expanded"), h, B, 0.5, None, None, None, True, True, True, False),
            (dy, h, B, 0.5, None, None, None, False, False, False, False),
        ],
        "column_norm": [
            (weight, A, B, 0.5),
            (weight, A32, B32, 0.5),
            (laid_out(weight, "transposed"), A32, B32, -2.0),
        ],
        "column_norm_cached_": [
            (torch.zeros_like(norm), stamp, weight, A32, B32, 0.5, True),
            (torch.zeros_like(norm), stamp, laid_out(weight, "rows"), A, B, -0.5, False),
        ],
        "magnitude_grad": [
            (shift, dy, x, h, weight, B, 0.5, g, norm, None),
            (shift, dy, x, h, weight, B, 0.5, small, norm, None),
            (shift, dy, x, h, weight, B, 0.5, small, norm, bias),
        ],
        "dropout_project": [(x, A, seed, 0.3), (wide, A, seed, 0.0)],
        "dropout_outer": [(u, x, seed, 0.3), (u, wide, seed, 0.9)],
        "dropout_lift_": [(x.clone(), u, A, seed, 0.3), (laid_out(x, "rows"), u, A, seed, 0.5)],
        "seeded_dropout": [(x, seed, 0.3), (wide, seed, 0.0)],
        "block_sum": [
            (x, r, None, None, 0.0),
            (x, r, None, seed, 0.3),
            (x, 1, None, None, 0.0),
            (x, k, None, None, 0.0),
            (wide, r, blocks, None, 0.0),
            (laid_out(x, "expanded"), 4, None, seed, 0.5),
        ],
        "block_tile_": [
            (x.clone(), h, None, None, 0.0, True),
            (x.clone(), h, None, None, 0.0, False),
            (laid_out(x, "rows"), h, blocks, None, 0.0, True),
            (x.clone(), h, None, seed, 0.3, True),
            (y.clone(), h, out_blocks, seed, 0.3, False),
        ],
    }  # fmt: skip


OPERATOR_NAMES = sorted(operator_samples())
SIZES = [{}, {"T": 1, "r": 1}, {"T": 70, "k": 131, "d": 66, "r": 17}]


def samples_of(name: str, **options) -> list[tuple]:
    """Arguments for an operator; its block offsets fit the default sizes only."""
    options = options | ({"k": 21, "d": 34, "r": 5} if name.startswith("block_") else {})
    return operator_samples(**options)[name]


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
    finally:
        _library.LayerOperator.__call__ = call
    return calls


def layer_samples(name: str, dtype: torch.dtype = torch.float32, shape: tuple = TYPICAL) -> list[tuple]:
    """Arguments of a layer operator: those of every family of problems, forward and backward, in place and not."""
    return _layer_calls(dtype, shape)[name]
