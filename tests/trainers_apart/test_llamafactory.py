"""LLaMA-Factory: run_exp(callbacks=[SpectralOpsCallback()]), and SPECTRAL_OPS_ACCELERATE=1 without a line of code."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import tiny
from runs import TOLD, all_fused, need, run, same_training

need("llamafactory")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    tiny.save_model(folder / "model")
    result = run("run_llamafactory.py", folder, "stock")
    assert "refused" in result
    return folder, result


def test_callback(stock):
    folder, plain = stock
    result = run("run_llamafactory.py", folder, "callback")
    all_fused(result)
    assert TOLD in result["output"]
    same_training(folder, plain, result, "callback")


def test_dora(stock):
    folder, _ = stock
    plain, result = (run("run_llamafactory.py", folder, mode) for mode in ("dora_stock", "dora"))
    all_fused(result)
    same_training(folder, plain, result, "dora", "dora_stock", tensors=3)


@pytest.mark.skipif(find_spec("spectral_ops.integrations.auto") is None, reason="spectral_ops.auto is not there yet")
def test_environment(stock):
    folder, plain = stock
    result = run("run_llamafactory.py", folder, "environment", SPECTRAL_OPS_ACCELERATE="1")
    all_fused(result)
    same_training(folder, plain, result, "environment")
