"""ms-swift: `--external_plugins FILE --callbacks spectral_ops`, under its wrapper around lora_A and lora_B."""

from __future__ import annotations

import pytest
import tiny
from runs import TOLD, all_fused, need, run, same_training

need("swift")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swift")
    tiny.save_model(folder / "model")
    result = run("run_swift.py", folder, "stock")
    assert "refused" in result
    return folder, result


def test_callback(stock):
    folder, plain = stock
    result = run("run_swift.py", folder, "callback")
    all_fused(result)
    assert TOLD in result["output"]
    same_training(folder, plain, result, "callback")


@pytest.mark.parametrize("method", ["dora", "adalora"])  # ms-swift changes AdaLoRA's own functions
def test_another_method(stock, method):
    folder, _ = stock
    plain, result = (run("run_swift.py", folder, mode) for mode in (f"{method}_stock", method))
    all_fused(result)
    same_training(folder, plain, result, method, f"{method}_stock", tensors=3)


def test_without_a_line_of_code(stock):
    folder, plain = stock
    result = run("run_swift.py", folder, "launched")
    all_fused(result)
    same_training(folder, plain, result, "launched")


def test_its_wrapper_is_the_one_that_is_seen_through():
    import torch
    from swift.tuners.peft import keep_device_forward

    from spectral_ops.integrations.peft_plan import hooked

    module = torch.nn.Linear(4, 2)
    module.forward_origin, module.forward = module.forward, keep_device_forward.__get__(module)
    assert not hooked(module)
