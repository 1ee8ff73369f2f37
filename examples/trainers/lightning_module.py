"""Lightning: python examples/trainers/lightning_module.py [MODEL [DATASET with a column "text"]]"""

import sys

import lightning
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_ops


class Tuned(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        config = LoraConfig(use_dora=True, target_modules="all-linear")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        spectral_ops.accelerate(self.model)  # the one line

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-4)


def main(model="HuggingFaceTB/SmolLM2-135M", data="roneneldan/TinyStories", **settings):
    words, tuned = AutoTokenizer.from_pretrained(model), Tuned(model)
    texts = load_dataset(data, split="train[:1000]")["text"]
    rows = [words(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"][0] for text in texts]
    lightning.Trainer(**{"max_steps": 100, **settings}).fit(tuned, torch.utils.data.DataLoader(rows))
    print(spectral_ops.report(tuned))
    return tuned.model


if __name__ == "__main__":
    main(*sys.argv[1:])
