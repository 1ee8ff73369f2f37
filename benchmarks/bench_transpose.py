"""The transposed copy of dy: its time, and that of the weight gradients' tiles with and without it."""

import pytest
import torch

from benchmarks import harness
from spectral_ops.functional import common


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_operator(benchmark, dtype):
    harness.operator(benchmark, "transpose_", dtype)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_gradient_tiles(benchmark, dtype, copied, monkeypatch):
    """Which dtypes the copy pays for: ``common.COPIED``."""
    dtype = harness.DTYPE[dtype]
    dy, x = torch.randn(harness.T, harness.D).to(dtype), torch.randn(harness.T, harness.K).to(dtype)
    monkeypatch.setattr(common, "COPIED", (dtype,) if copied else ())
    benchmark.pedantic(lambda: list(common.gradient_tiles(dy, x)), rounds=15, warmup_rounds=2)
