"""Tiny transformers models of many architectures, built in code: the same weights whenever a name is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

WORDS = 48
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 8}
ENCODER = {
    **SMALL, "intermediate_size": 48, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 8,
}  # fmt: skip
N_STYLE = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TIED = {"tie_word_embeddings": True}
ODD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # where the defaults lie outside of the vocabulary


@dataclass(frozen=True)
class Architecture:
    """How to build a model, what to ask it, and which tensor its answer is."""

    model_class: str
    config_class: str
    fields: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    output: Callable[[Any], torch.Tensor] = lambda out: out.logits
    task_type: str | None = None
    targets: tuple[str, ...] | None = None  # where PEFT finds none by itself, and neither "all-linear" works in PEFT

    def build(self) -> nn.Module:
        config = getattr(hf, self.config_class)(**self.fields)
        config._attn_implementation = "eager"
        return getattr(hf, self.model_class)(config)


def tokens() -> torch.Tensor:
    return torch.randint(3, WORDS, (2, 6), generator=torch.Generator().manual_seed(3))


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def sequences() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def causal(name: str, fields: dict[str, Any], config: str = "", targets=None) -> Architecture:
    config = config or f"{name}Config"
    return Architecture(f"{name}ForCausalLM", config, fields, text, task_type="CAUSAL_LM", targets=targets)


class Plain(nn.Module):
    """No transformers model: names that end in each other's, a layer called "0", no config."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)
        self.aq = nn.Linear(32, 32, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(32, 48), "q_norm": nn.LayerNorm(48), "0": nn.Linear(48, 32)})
            for _ in range(2)
        )
        self.also = nn.ModuleList([nn.Linear(32, 32)])
        self.final = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.aq(torch.tanh(self.q(x)))
        for layer in self.layers:
            x = x + layer["0"](torch.tanh(layer["q_norm"](layer["q"](x))))
        return self.final(self.also[0](x))


class PlainArchitecture(Architecture):
    def build(self) -> nn.Module:
        return Plain()


def features() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))}


def itself(out: torch.Tensor) -> torch.Tensor:
    return out


ARCHITECTURES: dict[str, Architecture] = {
    "llama": causal("Llama", DECODER),
    "llama_tied": causal("Llama", DECODER | TIED),
    "mistral": causal("Mistral", DECODER | {"sliding_window": 4}),
    "qwen2": causal("Qwen2", DECODER),
    "qwen3": causal("Qwen3", DECODER),
    "gemma2": causal("Gemma2", DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    "gemma3_text": causal("Gemma3", DECODER | {"query_pre_attn_scalar": 8, "sliding_window": 4}, "Gemma3TextConfig"),
    "phi": causal("Phi", DECODER | ODD),
    "phi3": causal("Phi3", DECODER | ODD),
    "stablelm": causal("StableLm", DECODER | {"use_qkv_bias": True}),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", N_STYLE | ODD, text, task_type="CAUSAL_LM"),
    "gpt_neox": causal("GPTNeoX", SMALL | {"intermediate_size": 48, "max_position_embeddings": 32}),
    "gptj": causal("GPTJ", N_STYLE | {"rotary_dim": 4} | ODD),
    "codegen": causal("CodeGen", N_STYLE | {"rotary_dim": 4} | ODD),
    "opt": causal("OPT", SMALL | {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32}),
    "bloom": causal("Bloom", SMALL | {"n_head": 4, "n_layer": 2}),
    "falcon": causal("Falcon", SMALL | ODD),
    "mpt": causal("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": WORDS, "max_seq_len": 32}),
    "mixtral": causal("Mixtral", EXPERTS | {"num_local_experts": 3}, targets=("q_proj", "o_proj")),
    "qwen3_moe": causal("Qwen3Moe", EXPERTS | {"num_experts": 3}, targets=("k_proj", "v_proj")),
    "t5": Architecture(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, sequences,
        task_type="SEQ_2_SEQ_LM",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration", "BartConfig",
        {
            "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
        }, sequences, task_type="SEQ_2_SEQ_LM",
    ),
    "bert": Architecture("BertForMaskedLM", "BertConfig", ENCODER, text),
    "bert_qa": Architecture(
        "BertForQuestionAnswering", "BertConfig", ENCODER | {"num_labels": 2}, text,
        lambda out: torch.stack([out.start_logits, out.end_logits]), "QUESTION_ANS",
    ),
    "roberta": Architecture(
        "RobertaForSequenceClassification", "RobertaConfig", ENCODER, text, task_type="SEQ_CLS",
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {
            "vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0,
            "attention_dropout": 0.0, "max_position_embeddings": 32, "num_labels": 8,
        }, text, task_type="SEQ_CLS", targets=("q_lin", "lin1"),
    ),
    "deberta_v2": Architecture(
        "DebertaV2ForTokenClassification", "DebertaV2Config", ENCODER | {"relative_attention": True}, text,
        task_type="TOKEN_CLS",
    ),
    "llama_cls": Architecture(
        "LlamaForSequenceClassification", "LlamaConfig", DECODER | ODD | {"num_labels": 8}, text, task_type="SEQ_CLS",
    ),
    "vit": Architecture(
        "ViTForImageClassification", "ViTConfig",
        {**ENCODER, "image_size": 8, "patch_size": 4}, images,
    ),
    "plain": PlainArchitecture("", "", {}, features, itself),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model in eval mode, every parameter drawn anew: what transformers initialises to zero or one hides errors."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            centre = 1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0
            p.copy_(centre + 0.15 * torch.randn(p.shape, generator=generator))
    return model


def answer(name: str, model: nn.Module) -> torch.Tensor:
    """What the model says to this architecture's inputs."""
    with torch.no_grad():
        return ARCHITECTURES[name].output(model(**ARCHITECTURES[name].inputs()))
