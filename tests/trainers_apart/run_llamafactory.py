"""LLaMA-Factory's run_exp as a user calls it: FOLDER MODE, mode stock, callback or environment."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import tiny


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports it to read sounds; its wheels need CUDA's libraries."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        module = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)


def main(folder: Path, mode: str) -> None:
    stand_in_for_torchaudio()
    from llamafactory.train.tuner import run_exp
    from record import Record

    callbacks = [Record(folder / f"{mode}.json")]
    if mode == "callback":
        from spectral_ops.integrations.transformers import SpectralOpsCallback

        callbacks.insert(0, SpectralOpsCallback())
    data = folder / "data"
    data.mkdir(exist_ok=True)
    tiny.save_alpaca(data / "tiny.json")
    (data / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    run_exp(
        args=dict(
            model_name_or_path=str(folder / "model"), dataset_dir=str(data), output_dir=str(folder / mode),
            stage="sft", do_train=True, dataset="tiny", template="alpaca", cutoff_len=256,
            finetuning_type="lora", lora_target="all", lora_rank=4,
            per_device_train_batch_size=2, learning_rate=1e-2, max_steps=5, logging_steps=1, seed=1,
            report_to="none", save_strategy="no", use_cpu=True,
        ),
        callbacks=callbacks,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
