"""LLaMA-Factory: run_exp(callbacks=[SpectralOpsCallback()]), and `python -m spectral_ops run`."""

from __future__ import annotations

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


def test_without_a_line_of_code(stock):
    folder, plain = stock
    result = run("run_llamafactory.py", folder, "launched", "-m", "spectral_ops", "run")
    all_fused(result)
    same_training(folder, plain, result, "launched")
