"""Tiny mixtures of experts built in code, a model of each family that PEFT's ``target_parameters`` reaches."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft_tiny import perturb

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
STACKS = ("gate_up_proj", "down_proj")
FAMILIES = {  # name -> prefix of the classes, the experts' place in a block, sizes
    "mixtral": ("Mixtral", "mlp.experts", {"intermediate_size": 24, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", "mlp.experts", {
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 5, "num_experts_per_tok": 2,
    }),
    "qwen3_moe": ("Qwen3Moe", "mlp.experts", {
        "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8,
    }),
    "olmoe": ("Olmoe", "mlp.experts", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3", "mlp.experts", {
        "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "num_key_value_heads": 4,
    }),
    "gpt_oss": ("GptOss", "mlp.experts", {
        "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    }),
    "llama4": ("Llama4", "feed_forward.experts", {
        "intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 8,
        "moe_layers": [0, 1],
    }),
}  # fmt: skip
INTERFACE = [name for name in FAMILIES if name != "llama4"]  # their experts take an implementation by name


def mixture(family: str, implementation: str | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    prefix, _, sizes = FAMILIES[family]
    name = "Llama4TextConfig" if family == "llama4" else f"{prefix}Config"
    config = getattr(transformers, name)(**{**SIZES, **sizes})
    if implementation is not None:
        config._experts_implementation = implementation
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name or "bias" in name:  # some families leave theirs empty
                p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def experts_config(family: str, stacks=STACKS, **extra) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], **extra}
    place = FAMILIES[family][1]
    return LoraConfig(target_parameters=[f"{place}.{stack}" for stack in stacks], **settings)


def adapted_mixture(
    family: str, implementation: str | None = None, dtype: torch.dtype = torch.float32, stacks=STACKS, **extra
) -> torch.nn.Module:
    """A mixture with one LoRA on its experts, in training mode."""
    torch.manual_seed(1)
    model = get_peft_model(mixture(family, implementation, dtype), experts_config(family, stacks, **extra))
    return perturb(model).train()


def experts_of(model: torch.nn.Module, everything: bool = False) -> list[torch.nn.Module]:
    """PEFT's wrappers around the experts: the outermost of each block, or all of them."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, ParamWrapper)}
    return [m for name, m in found.items() if everything or name.rpartition(".")[0] not in found]


def with_second(model: torch.nn.Module, config: LoraConfig) -> torch.nn.Module:
    """The model with an adapter of the name "second" beside the first, the same each time."""
    torch.manual_seed(2)
    try:
        model.add_adapter("second", config)
    except ValueError as refusal:
        if "only one LoRA adapter per model" not in str(refusal):
            raise
        pytest.skip("this PEFT takes one adapter with target_parameters in a model")
    return model
