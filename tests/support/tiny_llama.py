"""A tiny random Llama and a tokenizer of bytes, for the tests of examples/."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 160


def tiny_llama(hidden: int = 72, intermediate: int = 96) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


class Bytes:
    """A tokenizer of one token per byte."""

    def __init__(self, vocabulary: int = VOCABULARY):
        self.last = vocabulary - 1

    def __call__(self, text, verbose=True):
        return {"input_ids": [min(b, self.last) for b in text.encode()]}
