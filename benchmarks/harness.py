"""What the benchmarks share. Sizes are PERFORMANCE's CPU case; ratios are taken side by side in one run."""

from __future__ import annotations

import torch

from spectral_ops import _library
from spectral_ops.cli import bench, peers
from spectral_ops.cli.cases import arguments

T, D, K, R = 1024, 2048, 2048, 16
DTYPES = list(bench.DTYPES)


def operators(stem: str) -> list[str]:
    """The operators of one row of the grid."""
    return [name for name, operator in sorted(_library.OPERATORS.items()) if operator.stem == stem]


def tax(benchmark, record, method: str, dtype: str, target: float) -> None:
    """Measure the layer beside its peers in one run, put the rows into the closing table, and time our step by itself.

    A result that differs from the peer's fails. A missed target does not: on a shared machine it is a figure to read,
    and it is written beside the figure.
    """
    rows = bench.measure(method, T, D, K, peers.METHODS[method], bench.DTYPES[dtype], "cpu")
    record(rows)
    ratios = {row.implementation: round(1 + row.tax, 4) for row in rows}
    assert all(ratio == ratio for ratio in ratios.values()), f"red: a result differs from the peer's: {rows}"
    benchmark.extra_info.update(ratios=ratios, target=target, met=ratios["spectral_ops"] <= target)
    x = torch.randn(T, K, dtype=bench.DTYPES[dtype], requires_grad=True)
    layer = peers.function_layer(method, torch.randn(D, K, dtype=x.dtype), peers.METHODS[method])
    benchmark.pedantic(bench.step, (layer, x, torch.randn(T, D, dtype=x.dtype)), rounds=5, warmup_rounds=1)


def operator(benchmark, name: str, dtype: str) -> None:
    """Time one operator on its first sample arguments; GB/s and GFLOP/s come from its cost formula."""
    op = _library.OPERATORS[name]
    args = next(arguments(name, T, D, K, R, bench.DTYPES[dtype], "cpu"))
    cost = op.cost(*args)
    benchmark.pedantic(op, args, rounds=15, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(gigabytes_per_s=cost.bytes / seconds / 1e9, gigaflops=cost.flops / seconds / 1e9)
