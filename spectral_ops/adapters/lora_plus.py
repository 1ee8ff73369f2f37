"""LoRA+: a learning rate of its own for B (arXiv:2402.12354), as parameter groups for any optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from spectral_ops.core import checks


def lora_plus_groups(model, ratio, *, lr, weight_decay=0.0, embedding_lr=1e-6):
    """The trained parameters of ``model`` as groups for an optimizer: LoRA's B learns ``ratio`` times as fast.

    Args:
        model: one with LoRA adapters, of ours or PEFT's, accelerated or not.
        ratio: learning rate of B over that of A, > 0; the paper advises 16 and more.
        lr: learning rate of A and of what else trains, > 0.
        weight_decay: of all but biases and the parameters of normalisation layers, >= 0.
        embedding_lr: of LoRA's factors of an embedding, which PEFT's models have, >= 0.

    Returns a list of dicts with "params", "weight_decay" and "lr", none of them empty, in the order: A and other
    matrices; factors of embeddings; B and vectors; those of the last without weight decay. They are the groups of
    PEFT's ``create_loraplus_optimizer``, but that no normalisation layer decays, where PEFT spares a LayerNorm alone.
    Raises TypeError/ValueError that name the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {checks.describe(model)}, wanted a torch.nn.Module")
    for name, value, least in (
        ("ratio", ratio, "above 0"), ("lr", lr, "above 0"),
        ("weight_decay", weight_decay, "at least 0"), ("embedding_lr", embedding_lr, "at least 0"),
    ):  # fmt: skip
        checks.number(name, value)
        if value < 0 or (value == 0 and least == "above 0"):
            raise ValueError(f"{name}: got {value!r}, wanted a number {least}")
    norms = tuple(f"{path}." for path, module in model.named_modules() if path and _normalises(module))
    matrices, embeddings, faster, undecayed = [], [], [], []
    found = False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found |= "lora_B" in name
        if "lora_embedding_" in name:
            embeddings.append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            (undecayed if "bias" in name or name.startswith(norms) else faster).append(parameter)
        else:
            matrices.append(parameter)
    if not found:
        raise ValueError("model: got no trained lora_B, wanted a model with a LoRA adapter that trains")
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "lr": lr},
        {"params": embeddings, "weight_decay": weight_decay, "lr": embedding_lr},
        {"params": faster, "weight_decay": weight_decay, "lr": lr * ratio},
        {"params": undecayed, "weight_decay": 0.0, "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
