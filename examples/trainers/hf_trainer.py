"""transformers' Trainer: python examples/trainers/hf_trainer.py [MODEL [DATASET with a column "text"]]"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from spectral_ops.integrations.transformers import SpectralOpsCallback


def main(model="HuggingFaceTB/SmolLM2-135M", data="roneneldan/TinyStories", **settings):
    words = AutoTokenizer.from_pretrained(model)
    words.pad_token = words.pad_token or words.eos_token
    rows = load_dataset(data, split="train[:1000]")
    rows = rows.map(lambda row: words(row["text"], truncation=True, max_length=512), remove_columns=rows.column_names)
    config = LoraConfig(use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config),
        TrainingArguments(**{"output_dir": "outputs/hf_trainer", "max_steps": 100, "learning_rate": 2e-4, **settings}),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        callbacks=[SpectralOpsCallback()],  # the one line
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


if __name__ == "__main__":
    main(*sys.argv[1:])
