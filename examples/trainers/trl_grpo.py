"""TRL's GRPOTrainer: python examples/trainers/trl_grpo.py [MODEL [DATASET of prompts]]

Without a GPU: main(..., use_cpu=True).
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from spectral_ops.integrations.transformers import SpectralOpsCallback


def distinct_letters(completions, **kwargs):
    """A reward that needs no other model."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(set(text))) for text in texts]


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct", data="trl-lib/tldr", **settings):
    trainer = GRPOTrainer(
        model,
        distinct_letters,
        args=GRPOConfig(**{"output_dir": "outputs/trl_grpo", "max_steps": 20, "num_generations": 4, **settings}),
        train_dataset=load_dataset(data, split="train[:1000]"),
        peft_config=LoraConfig(target_modules="all-linear"),
        callbacks=[SpectralOpsCallback()],  # the one line
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


if __name__ == "__main__":
    main(*sys.argv[1:])
