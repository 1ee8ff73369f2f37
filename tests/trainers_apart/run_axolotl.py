"""`axolotl train FILE.yaml`: FOLDER MODE, mode stock, plugin, kernels, past, or
dpo_stock and dpo, where the adapter is made by TRL inside the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import yaml

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainers" / "axolotl.yaml"


def settings(folder: Path, mode: str) -> dict:
    """The example, at a tiny size."""
    data = {"path": str(tiny.save_alpaca(folder / "tiny.json")), "type": "alpaca", "ds_type": "json"}
    result = yaml.safe_load(EXAMPLE.read_text()) | {
        "base_model": str(folder / "model"), "output_dir": str(folder / mode), "datasets": [data],
        "dataset_prepared_path": str(folder / "prepared"), "dataset_num_proc": 1, "sequence_len": 256,
        "lora_r": 4, "lora_alpha": 8, "max_steps": 5, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "val_set_size": 0, "seed": 1,
        "attn_implementation": "eager", "device": "cpu", "use_cpu": True, "bf16": False, "fp16": False, "tf32": False,
    }  # fmt: skip
    if mode.startswith("dpo"):
        data |= {"path": str(tiny.save_pairs(folder / "pairs.json")), "type": "passthrough", "split": "train"}
        result["rl"] = "dpo"
    if mode.endswith("stock"):
        del result["plugins"]
        result |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    if mode == "past":  # what the plugin is there to prevent
        del result["plugins"]
    if mode in ("kernels", "past"):
        result |= {"lora_qkv_kernel": True, "lora_o_kernel": True}
    return result


def main(folder: Path, mode: str) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.train import train
    from record import Record

    from spectral_ops import accelerate

    class Recorder(BasePlugin):
        def add_callbacks_post_trainer(self, cfg, trainer):
            if mode == "past":
                accelerate(trainer.model)
            return [Record(folder / f"{mode}.json")]

    PluginManager.get_instance().plugins["recorder"] = Recorder()
    path = folder / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, mode)))
    cfg = load_cfg(str(path))
    load = load_preference_datasets if cfg.rl else load_datasets
    train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
