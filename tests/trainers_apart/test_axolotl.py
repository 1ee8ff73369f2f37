"""axolotl: one line of plugins in the yaml, with its own LoRA kernels kept off."""

from __future__ import annotations

import pytest
import tiny
from runs import all_fused, need, run, same_training

need("axolotl")

QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    tiny.save_model(folder / "model")
    result = run("run_axolotl.py", folder, "stock", **QUIET)
    assert "refused" in result
    return folder, result


@pytest.mark.parametrize("mode", ["plugin", "kernels"])
def test_plugin(stock, mode):
    folder, plain = stock
    result = run("run_axolotl.py", folder, mode, **QUIET)
    all_fused(result)
    same_training(folder, plain, result, mode)
    warned = "lora_qkv_kernel, lora_o_kernel: axolotl's kernels read A and B past the layers" in result["output"]
    assert warned is (mode == "kernels")


def test_strict_refuses_its_kernels(stock):
    with pytest.raises(AssertionError, match="set them to false, or take the plugin out"):
        run("run_axolotl.py", stock[0], "strict", **QUIET)
