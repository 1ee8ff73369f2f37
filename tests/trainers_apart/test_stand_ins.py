"""The plugins over stand-ins for axolotl and ms-swift, in every run of the tests; `make trainers` has the real ones."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft_tiny import adapted, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stand_in(monkeypatch):
    """Imports one of our modules over modules of somebody else's that hold no more than it needs."""

    def load(ours: str, **theirs):
        for name in [name for name in sys.modules if name.split(".")[0] == next(iter(theirs)).split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        for name, members in theirs.items():
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
            vars(sys.modules[name]).update(members)
        monkeypatch.delitem(sys.modules, ours, raising=False)
        return importlib.import_module(ours)

    yield load
    for ours in ("axolotl", "swift"):
        sys.modules.pop(f"spectral_ops.integrations.{ours}", None)


def test_axolotl_s_plugin(stand_in, caplog):
    module = stand_in("spectral_ops.integrations.axolotl", **{"axolotl.integrations.base": {"BasePlugin": object}})
    plugin, cfg = module.SpectralOpsPlugin(), {"lora_o_kernel": True, "spectral_ops": {"exact": True}}
    with caplog.at_level(logging.WARNING, "spectral_ops"):
        plugin.register(cfg)
    assert "lora_o_kernel: axolotl's kernels read A and B past the layers" in caplog.text
    assert {cfg[flag] for flag in module.KERNELS} == {False}
    caplog.clear()
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    assert not caplog.text
    callbacks, model = [], adapted("lora")
    trainer = SimpleNamespace(model=model, args=None, state=None, control=None, add_callback=callbacks.append)
    plugin.post_trainer_create(cfg, trainer)
    model(tokens())
    assert callbacks[0].report.counts["fused"] == 14 and callbacks[0].options["exact"]
    cfg["lora_qkv_kernel"] = True
    with pytest.raises(ValueError, match="lora_qkv_kernel: switched on after"):
        plugin.pre_model_load(cfg)
    with pytest.raises(ValueError, match="set them to false, or take the plugin out"):
        plugin.register({"lora_mlp_kernel": True, "spectral_ops": {"strict": True}})


def test_ms_swift_s_callback(stand_in):
    known = {}
    module = stand_in("spectral_ops.integrations.swift", **{"swift.callbacks": {"callbacks_map": known}})
    assert known["spectral_ops"]("arguments", "trainer").strict is False
    module.register(strict=True)
    assert known["spectral_ops"]("arguments", "trainer").strict is True
