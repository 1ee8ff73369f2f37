"""TRL's DPOTrainer: python examples/trainers/trl_dpo.py [MODEL [DATASET of preferences]]

Reward, KTO, RLOO and GRPO take the same line (docs/trainers.md). Without a GPU: main(..., use_cpu=True).
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from spectral_ops.integrations.transformers import SpectralOpsCallback


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct", data="trl-lib/ultrafeedback_binarized", **settings):
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**{"output_dir": "outputs/trl_dpo", "max_steps": 100, "max_length": 512, **settings}),
        train_dataset=load_dataset(data, split="train[:1000]"),
        peft_config=LoraConfig(target_modules="all-linear"),
        callbacks=[SpectralOpsCallback()],  # the one line
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


if __name__ == "__main__":
    main(*sys.argv[1:])
