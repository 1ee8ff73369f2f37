"""What the benchmarks share. Sizes are PERFORMANCE's CPU case; ratios are taken side by side in one run."""

from __future__ import annotations

import functools

import torch

from benchmarks.publish import TARGETS
from spectral_ops import _library
from spectral_ops.bench import layers, peers
from spectral_ops.bench.clock import measure_ceilings
from spectral_ops.bench.methods import DTYPES as DTYPE
from spectral_ops.bench.results import Ceiling
from spectral_ops.bench.samples import arguments

T, D, K, R = 1024, 2048, 2048, 16
DTYPES = list(DTYPE)


@functools.cache
def ceiling(dtype: str) -> Ceiling:
    """This machine's, measured once."""
    return measure_ceilings("cpu", {dtype: DTYPE[dtype]})[dtype]


def operators(stem: str) -> list[str]:
    """The operators of one row of the grid."""
    return [name for name, operator in sorted(_library.OPERATORS.items()) if operator.stem == stem]


def tax(benchmark, record, method: str, dtype: str) -> None:
    """Measure the layer beside its peers in one run, put the rows into the closing table, and time our step by itself.

    A result that is wrong fails. A missed target does not: on a shared machine it is a figure to read,
    and it is written beside the figure.
    """
    rank = peers.METHODS[method]
    rows = layers.measure(method, T, D, K, rank, DTYPE[dtype], "cpu", ceiling(dtype))
    record(rows)
    assert not any(row.red for row in rows), f"red: a result is wrong: {rows}"
    ratios = {row.implementation: round(row.ratio, 4) for row in rows}
    target = TARGETS["cpu"][method, dtype]
    benchmark.extra_info.update(ratios=ratios, target=target, met=ratios["spectral_ops"] <= target)
    x = torch.randn(T, K, dtype=DTYPE[dtype], requires_grad=True)
    subject = peers.Subject(method, torch.randn(D, K, dtype=x.dtype), rank)
    benchmark.pedantic(layers.step, (subject.ours, x, torch.randn(T, D, dtype=x.dtype)), rounds=5, warmup_rounds=1)


def operator(benchmark, name: str, dtype: str) -> None:
    """Time one operator on its first sample arguments; GB/s and GFLOP/s come from its cost formula."""
    op = _library.OPERATORS[name]
    args = next(arguments(name, T, D, K, R, DTYPE[dtype], "cpu"))
    cost = op.cost(*args)
    benchmark.pedantic(op, args, rounds=15, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(gigabytes_per_s=cost.bytes / seconds / 1e9, gigaflops=cost.flops / seconds / 1e9)
