"""One training twice, as it is and with the callback: what the tests of every trainer compare."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, MissConfig
from safetensors.torch import load_file
from tiny import ADAPTED, TARGETS, conversations, language_model, tokenizer

from spectral_ops.integrations.transformers import SpectralOpsCallback

STEPS = 3
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "miss": lambda: MissConfig(r=4, target_modules=TARGETS, init_weights=False),
}


def arguments(kind, folder: Path, **more):
    """Every step logged, and in float32: TRL's default is bfloat16, where 1e-5 would be luck."""
    usual = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "bf16": False,
    }  # fmt: skip
    return kind(**{**usual, **more})


def texts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"text": f"{c['instruction']} {c['output']}"} for c in conversations(count)])


def preferences(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": c["instruction"], "chosen": c["output"], "rejected": c["output"].replace("is", "was")}
            for c in conversations(count)
        ]
    )


def judged(count: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": c["instruction"], "completion": c["output"], "label": i % 2 == 0}
            for i, c in enumerate(conversations(count))
        ]
    )


def prompts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": c["instruction"]} for c in conversations(count)])


def run(build, folder: Path, *callbacks) -> tuple[list[float], dict[str, torch.Tensor], torch.nn.Module]:
    """Losses of every step, the adapter file, and the model, of ``build(folder, model, tokenizer, callbacks)``."""
    torch.manual_seed(0)
    trainer = build(folder, copy.deepcopy(language_model()), tokenizer(), list(callbacks))
    trainer.train()
    trainer.save_model(str(folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, load_file(folder / "adapter_model.safetensors"), trainer.model


def the_same_with_the_callback(build, tmp_path: Path, caplog_text) -> None:
    """Losses within 1e-5, adapter files equal to rounding, every layer fused, and one line that says so."""
    losses, adapter, _ = run(build, tmp_path / "plain")
    callback = SpectralOpsCallback(strict=True)
    fused_losses, fused_adapter, _ = run(build, tmp_path / "fused", callback)
    assert len(losses) == STEPS and any(losses)
    torch.testing.assert_close(torch.tensor(fused_losses), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    assert fused_adapter.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(fused_adapter[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    report = callback.report
    assert report.counts == {"fused": ADAPTED, "fused (base-agnostic)": 0, "PEFT": 0}, str(report)
    assert min(row.calls for row in report.rows) >= STEPS and not report.fallbacks(), str(report)
    assert caplog_text().count(f"spectral_ops: {ADAPTED} layers fused") == 1
