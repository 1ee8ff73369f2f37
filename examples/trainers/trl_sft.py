"""TRL's SFTTrainer, which makes the PEFT model: python examples/trainers/trl_sft.py [MODEL [DATASET]]

Without a GPU: main(..., use_cpu=True).
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from spectral_ops.integrations.transformers import SpectralOpsCallback


def main(model="HuggingFaceTB/SmolLM2-135M", data="roneneldan/TinyStories", **settings):
    trainer = SFTTrainer(
        model,
        SFTConfig(**{"output_dir": "outputs/trl_sft", "max_steps": 100, "max_length": 512, **settings}),
        train_dataset=load_dataset(data, split="train[:1000]"),
        peft_config=LoraConfig(use_dora=True, target_modules="all-linear"),
        callbacks=[SpectralOpsCallback()],  # the one line
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


if __name__ == "__main__":
    main(*sys.argv[1:])
