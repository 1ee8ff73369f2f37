"""What a run of a trainer starts from, built in code: a small Llama, a tokenizer of bytes, a few conversations."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
LAYERS = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED = LAYERS * len(TARGETS)


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", "<unk>", *alphabet]
    built = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        chat_template=TEMPLATE, model_max_length=256,
    )  # fmt: skip


def language_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip


def save_model(folder: Path) -> Path:
    """A model and its tokenizer, as a trainer loads them from a folder."""
    language_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def conversations(count: int = 24) -> list[dict]:
    return [
        {"instruction": f"What is {i} and {i * 3 % 7}?", "input": "", "output": f"It is {i + i * 3 % 7}."}
        for i in range(count)
    ]


def save_alpaca(path: Path) -> Path:
    path.write_text(json.dumps(conversations()))
    return path


def save_messages(path: Path) -> Path:
    """The same conversations as one line of messages each."""
    lines = [
        {"messages": [{"role": "user", "content": c["instruction"]}, {"role": "assistant", "content": c["output"]}]}
        for c in conversations()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_pairs(path: Path) -> Path:
    """The same conversations with a wrong answer beside each, for preference training."""
    pairs = [{"prompt": c["instruction"], "chosen": c["output"], "rejected": "No."} for c in conversations()]
    path.write_text(json.dumps(pairs))
    return path
