"""axolotl: one line of plugins in the yaml, with its own LoRA kernels kept off."""

from __future__ import annotations

import pytest
import tiny
from runs import TOLD, all_fused, need, run, same_training

need("axolotl")

QUIET = {"AXOLOTL_DO_NOT_TRACK": "1"}
PAST = "axolotl's kernels read A and B past the layers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    tiny.save_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    result = run("run_axolotl.py", folder, "stock", **QUIET)
    assert "refused" in result
    return result


@pytest.mark.parametrize("mode", ["plugin", "kernels"])
def test_plugin(folder, stock, mode):
    result = run("run_axolotl.py", folder, mode, **QUIET)
    all_fused(result)
    assert TOLD in result["output"]
    same_training(folder, stock, result, mode)
    assert (f"lora_qkv_kernel, lora_o_kernel: {PAST}" in result["output"]) is (mode == "kernels")


def test_an_adapter_that_the_trainer_makes(folder):
    """For DPO, TRL makes it when axolotl's loader is done, so post_lora_load would see none."""
    plain, result = (run("run_axolotl.py", folder, mode, **QUIET) for mode in ("dpo_stock", "dpo"))
    all_fused(result)
    same_training(folder, plain, result, "dpo", "dpo_stock")


def test_without_the_plugin_its_kernels_go_past_the_layers(folder):
    """q, k, v and o are never called, and the report says so."""
    result = run("run_axolotl.py", folder, "past", **QUIET)
    assert (result["counts"]["fused"], result["counts"]["never called"]) == (6, 8)


def test_it_acts_before_axolotl_decides():
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.validation import lora_kernels_auto_enable

    from spectral_ops.integrations.axolotl import SpectralOpsPlugin

    cfg, plugin = DictDefault(adapter="lora"), SpectralOpsPlugin()
    assert lora_kernels_auto_enable(cfg.get)
    plugin.register(cfg)
    assert not lora_kernels_auto_enable(cfg.get)
    plugin.pre_model_load(cfg)
    cfg.lora_o_kernel = True
    with pytest.raises(ValueError, match="lora_o_kernel: switched on after"):
        plugin.pre_model_load(cfg)
    with pytest.raises(ValueError, match=f"lora_o_kernel: {PAST}.*; set them to false, or take the plugin out"):
        plugin.register(DictDefault(lora_o_kernel=True, spectral_ops={"strict": True}))
