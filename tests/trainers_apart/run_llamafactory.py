"""LLaMA-Factory's run_exp as a user calls it: FOLDER MODE, mode stock, callback, launched, dora, dora_stock."""

from __future__ import annotations

import importlib.machinery
import json
import runpy
import sys
import types
from pathlib import Path

import tiny
import yaml

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainers" / "llamafactory_train.py"


def stand_in_for_torchaudio() -> None:
    """LLaMA-Factory imports it to read sounds; its wheels need CUDA's libraries."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        module = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)


def main(folder: Path, mode: str) -> None:
    stand_in_for_torchaudio()
    from llamafactory.train import tuner
    from record import Record

    data = folder / "data"
    data.mkdir(exist_ok=True)
    tiny.save_alpaca(data / "tiny.json")
    (data / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    options = {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(data), "output_dir": str(folder / mode),
        "stage": "sft", "do_train": True, "dataset": "tiny", "template": "alpaca", "cutoff_len": 256,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 5, "logging_steps": 1, "seed": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    if mode.startswith("dora"):
        options["use_dora"] = True
    run_exp, record = tuner.run_exp, Record(folder / f"{mode}.json")
    if mode in ("callback", "dora"):  # the example, with the recording beside its callback
        path = folder / "options.yaml"
        path.write_text(yaml.safe_dump(options))
        sys.argv[1:] = [str(path)]
        tuner.run_exp = lambda callbacks: run_exp(callbacks=[*callbacks, record])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    else:
        run_exp(args=options, callbacks=[record])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
