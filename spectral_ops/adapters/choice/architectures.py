"""Which modules PEFT adapts where a config names none: a choice by ``model.config.model_type``.

The names are those of PEFT's tables, which a test compares with these wherever PEFT is installed.
"""

from __future__ import annotations

from torch import nn

QV, FUSED = ["q_proj", "v_proj"], ["query_key_value"]
TARGETS: dict[str, list[str] | str] = {
    "bart": QV,
    "bert": ["query", "value"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "bloom": FUSED,
    "btlm": ["c_proj", "c_attn"],
    "chatglm": FUSED,
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
    "falcon": FUSED,
    "gemma": QV,
    "gemma2": QV,
    "gemma3_text": QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": QV,
    "gpt_neox": FUSED,
    "gptj": QV,
    "layoutlm": ["query", "value"],
    "llama": QV,
    "llama4": QV,
    "mistral": QV,
    "mixtral": QV,
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": QV,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "qwen2": QV,
    "qwen3": QV,
    "RefinedWeb": FUSED,
    "RefinedWebModel": FUSED,
    "roberta": ["query", "value"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "stablelm": QV,
    "t5": ["q", "v"],
    "xlm-roberta": ["query", "value"],
}
DENSE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# where a method's table in PEFT says something else; None: the method has no entry for that architecture
OTHERWISE: dict[str, dict[str, list[str] | str | None]] = {
    "ADALORA": {
        "bart": DENSE,
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "opt": DENSE,
        "roberta": ["query", "key", "value", "dense"],
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        **dict.fromkeys(
            ["blip-2", "btlm", "chatglm", "codegen", "electra", "falcon", "layoutlm", "mistral", "mixtral", "mpt",
             "phi", "RefinedWeb", "RefinedWebModel", "rwkv", "rwkv7", "stablelm", "xlm-roberta"]
        ),
    },
    "VERA": {"phi": QV},
}  # fmt: skip


def model_type(model: nn.Module) -> str | None:
    """``model.config.model_type`` (``config`` an object or a dict); None where there is none."""
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def default_targets(model: nn.Module, peft_type: str) -> list[str] | str | None:
    """What PEFT's method of that type adapts in this model by default; LoRA's choice for a method PEFT lacks.

    None where the architecture is unknown.
    """
    kind = model_type(model)
    base = peft_type.removesuffix("_DASH") if peft_type.startswith("ADALORA") else peft_type
    return OTHERWISE.get(base, {}).get(kind, TARGETS.get(kind)) if isinstance(kind, str) else None
