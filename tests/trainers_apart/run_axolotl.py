"""`axolotl train FILE.yaml`: FOLDER MODE, mode stock, plugin, kernels or strict."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import yaml


def settings(folder: Path, mode: str) -> dict:
    result = {
        "base_model": str(folder / "model"), "output_dir": str(folder / mode),
        "datasets": [{"path": str(tiny.save_alpaca(folder / "tiny.json")), "type": "alpaca", "ds_type": "json"}],
        "dataset_prepared_path": str(folder / "prepared"), "dataset_num_proc": 1, "sequence_len": 256,
        "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True,
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 5, "learning_rate": 1e-2,
        "optimizer": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "val_set_size": 0, "seed": 1,
        "attn_implementation": "eager", "device": "cpu", "use_cpu": True, "bf16": False, "fp16": False, "tf32": False,
        "plugins": ["spectral_ops.integrations.axolotl.SpectralOpsPlugin"],
    }  # fmt: skip
    if mode == "stock":
        del result["plugins"]
        result |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    if mode in ("kernels", "strict"):
        result |= {"lora_qkv_kernel": True, "lora_o_kernel": True}
    if mode == "strict":
        result["spectral_ops"] = {"strict": True}
    return result


def main(folder: Path, mode: str) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.train import train
    from record import Record

    class Recorder(BasePlugin):
        def add_callbacks_post_trainer(self, cfg, trainer):
            return [Record(folder / f"{mode}.json")]

    PluginManager.get_instance().plugins["recorder"] = Recorder()
    path = folder / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, mode)))
    cfg = load_cfg(str(path))
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
