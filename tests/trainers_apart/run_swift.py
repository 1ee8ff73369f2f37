"""`swift sft` with the arguments a user gives: FOLDER MODE, mode stock, callback or launched,
or the name of a method, and the same with _stock behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny

HERE = Path(__file__).resolve().parent


def main(folder: Path, mode: str) -> None:
    plugins, callbacks = [folder / f"record_{mode}.py"], ["record"]
    plugins[0].write_text(
        "from record import Record\nfrom swift.callbacks import callbacks_map\n"
        f"callbacks_map['record'] = lambda args, trainer: Record({str(folder / f'{mode}.json')!r})\n"
    )
    if mode != "launched" and not mode.endswith("stock"):
        plugins.append(HERE.parents[1] / "examples" / "trainers" / "swift_plugin.py")
        callbacks.insert(0, "spectral_ops")
    options = {
        "model": folder / "model", "model_type": "llama", "template": "llama3", "use_hf": "true",
        "dataset": tiny.save_messages(folder / "tiny.jsonl"), "split_dataset_ratio": 0,
        "output_dir": folder / mode, "add_version": "false", "create_checkpoint_symlink": "false",
        "tuner_type": "lora", "target_modules": "all-linear", "lora_rank": 4, "lora_dropout": 0,
        "torch_dtype": "float32", "use_cpu": "true", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "max_steps": 5, "logging_steps": 1, "seed": 1,
        "report_to": "none", "save_steps": 5,
    }  # fmt: skip
    if mode.startswith("dora"):
        options["use_dora"] = "true"
    if mode.startswith("adalora"):
        options["tuner_type"] = "adalora"
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    arguments += ["--external_plugins", *map(str, plugins), "--callbacks", *callbacks]
    if mode == "launched":
        subprocess.run([sys.executable, "-m", "spectral_ops", "run", "-m", "swift.cli.sft", *arguments], check=True)
    else:
        from swift.pipelines import sft_main

        sft_main(arguments)
    saved = folder / mode / "checkpoint-5" / "adapter_model.safetensors"
    saved.replace(folder / mode / saved.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
