"""Tiny models built in code, adapted by PEFT, in pairs: one as PEFT made it, one for spectral_ops.accelerate."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, MissConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "miss": {"init_weights": True},
    "miss_mini": {"init_weights": "mini", "mini_r": 8},
    "miss_bat": {"init_weights": "bat", "r": 8},
}


def config(method: str, **extra):
    """PEFT's configuration of a method; rank 5 divides nothing here, so MiSS meets a ragged last block."""
    settings = {"r": 5, "target_modules": ATTENTION + MLP, **METHODS[method], **extra}
    if method.startswith("miss"):
        return MissConfig(**settings)
    return LoraConfig(lora_alpha=8, **settings)


def perturb(model: torch.nn.Module, scale: float = 0.1) -> torch.nn.Module:
    """Random values on top of every trainable parameter, so that no gradient is trivially zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def llama(dtype: torch.dtype = torch.float32, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attention_bias=bias, mlp_bias=bias,
            initializer_range=0.15,
        )
    )  # fmt: skip
    if bias:
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.15,
        )
    )  # fmt: skip


def adapted(method: str, dtype: torch.dtype = torch.float32, *, base_bias: bool = False, autocast_dtype=True, **extra):
    """A Llama with one adapter of ``method``, in training mode."""
    torch.manual_seed(1)
    model = get_peft_model(llama(dtype, base_bias), config(method, **extra), autocast_adapter_dtype=autocast_dtype)
    return perturb(model).train()


def pair(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model and an independent copy of it."""
    return model, copy.deepcopy(model)


def tokens(batch: int = 2, length: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def logits_and_gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, the gradient of the loss for every trainable parameter, and for the embedded input."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=ids)
    out.loss.backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "input": embedded.grad, **results}


def errors(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> dict[str, float]:
    """Frobenius norm of each tensor's difference relative to the tensor; None must meet None."""
    assert expected.keys() == got.keys()
    result = {}
    for name, e in expected.items():
        g = got[name]
        assert (e is None) == (g is None), name
        if e is not None:
            assert e.shape == g.shape, name
            result[name] = ((e.double() - g.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
    return result


def worst(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    """The largest of :func:`errors`; dtypes must agree as well."""
    assert all(e is None or e.dtype == got[name].dtype for name, e in expected.items())
    return max(errors(expected, got).values())
