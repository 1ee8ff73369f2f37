"""Tensor parallel: torchrun --nproc-per-node 2 examples/trainers/tensor_parallel.py [MODEL [DATASET]]"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_ops


def main(model="HuggingFaceTB/SmolLM2-135M", data="roneneldan/TinyStories", steps=100):
    words = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, tp_plan="auto")
    torch.manual_seed(0)  # the parts of an adapter that every process has whole must start equal
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"]))
    report = spectral_ops.accelerate(adapted)  # the one line
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-4, foreach=False)
    for text in load_dataset(data, split=f"train[:{steps}]")["text"]:
        ids = words(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"].to(base.device)
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.distributed.get_rank() == 0:
        print(report)
    return adapted


if __name__ == "__main__":
    main(*sys.argv[1:])
