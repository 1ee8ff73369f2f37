"""FSDP1: torchrun --nproc-per-node 2 examples/trainers/fsdp.py [MODEL [DATASET with a column "text"]]"""

import functools
import sys

import torch
import torch.distributed as dist
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_ops


def main(model="HuggingFaceTB/SmolLM2-135M", data="roneneldan/TinyStories", steps=100):
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    words, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(plain, LoraConfig(use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    spectral_ops.accelerate(tuned)  # the one line
    blocks = {type(plain.get_decoder().layers[0])}  # whole blocks: each is gathered once, adapters and all
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    tuned = FullyShardedDataParallel(tuned, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-4)
    for text in load_dataset(data, split="train[:1000]")["text"][rank::size][:steps]:
        ids = words(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"].to(device)
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


if __name__ == "__main__":
    dist.init_process_group()
    print(spectral_ops.report(main(*sys.argv[1:])))
    dist.destroy_process_group()
