"""The input embedding of a transformers model, the modules tied to it, and what of them travels with an adapter."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens
from spectral_ops.adapters.tree import Unit, walk

NAMES = ("embed_tokens", "lm_head")  # what PEFT takes for an embedding by its name
ISSUE = "https://github.com/huggingface/peft/issues/2777"


def original(module: nn.Module) -> nn.Module:
    """The module as it was before any adapter."""
    if isinstance(module, AdapterLinear):
        return module.base_layer
    return module.original_module if isinstance(module, Unit) else module


def _embedding(model: nn.Module, getter: str) -> tuple[str, nn.Module] | None:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next(((path, m) for path, m in walk(model) if m is module), None) if module is not None else None


def embedding_pair(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the model's input and of its output embedding, as far as it has them."""
    found = (_embedding(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    return [pair for pair in found if pair is not None]


def input_embedding(model: nn.Module) -> str | None:
    """The path of the model's input embedding."""
    found = _embedding(model, "get_input_embeddings")
    return found and found[0]


def tied_to_input(model: nn.Module) -> list[str]:
    """The paths of other modules that hold the very weight of the input embedding."""
    path = input_embedding(model)
    if path is None or getattr(getattr(model, "config", None), "tie_word_embeddings", True) is False:
        return []
    modules = {p: original(m) for p, m in walk(model)}
    weight = modules[path]._parameters.get("weight")
    return [p for p, m in modules.items() if weight is not None and p != path and m._parameters.get("weight") is weight]


def named(names: list[str] | str | None, targets: bool = False) -> bool:
    """Whether a field of a config chooses an embedding, judged by its names as PEFT does."""
    if isinstance(names, str):
        return targets and any(re.fullmatch(names, name) for name in NAMES)
    return any(name.rpartition(".")[2] in NAMES for name in names or [])


def warn_tied(model: nn.Module, config: AdapterConfig) -> None:
    """Say what PEFT says of adapters on one of several modules that share a weight."""
    ensure = getattr(config, "ensure_weight_tying", None)
    chosen = named(config.modules_to_save) or named(config.target_modules, targets=True)
    tied = tied_to_input(model) if chosen or ensure else []
    if ensure and not getattr(config, "trainable_token_indices", None) and not (tied and chosen):
        missing = "no module tied to the input embedding" if not tied else "no embedding in modules_to_save"
        warnings.warn(f"ensure_weight_tying: got True and {missing}, so it does nothing", stacklevel=3)
    if chosen and tied and not ensure:
        remedy = "ensure_weight_tying=True trains them as one" if ensure is not None else "this method cannot tie them"
        warnings.warn(
            f"the model ties {', '.join(tied)} to {input_embedding(model)}, and the adapter trains one without the"
            f" other; merging it, or writing the model to another format, may lose that ({remedy}; {ISSUE})",
            stacklevel=3,
        )


def warn_head(model: nn.Module, layers: Collection[str]) -> None:
    """Say that TRL, where it is imported, computes with the output head's weight, past an adapter on it."""
    head = _embedding(model, "get_output_embeddings")
    if head is not None and head[0] in layers and "trl" in sys.modules:
        warnings.warn(
            f"target_modules: got {head[0]!r}, the output head, whose weight TRL's trainers compute with themselves, so"
            " that an adapter there is without effect under them (modules_to_save trains the head whole)",
            stacklevel=3,
        )


def resized(model: nn.Module) -> bool:
    """Whether the vocabulary differs from that of the base model, where its folder, or a copy of its repository, is
    on this machine."""
    config, size = _base_config(model), getattr(getattr(model, "config", None), "vocab_size", None)
    if not size or config is None or not config.is_file():
        return False
    return json.loads(config.read_text()).get("vocab_size", size) != size


def _base_config(model: nn.Module) -> Path | None:
    """The config.json of what the model was loaded from; of a repository the copy in the cache of huggingface_hub."""
    name, hub = base_name(model), sys.modules.get("huggingface_hub")
    if not name or Path(name).is_dir() or hub is None:
        return Path(name) / "config.json" if name else None
    revision = getattr(model.config, "_commit_hash", None) if hasattr(model, "config") else None
    try:
        found = hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from: a folder or the name of a repository."""
    return (
        model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None)
    ) or None


def travelling(model: nn.Module, config: AdapterConfig, save: bool | str) -> dict[str, torch.Tensor]:
    """Base tensors that belong into the adapter's file, by the path that they have in PEFT's model.

    save: True or False, or "auto": where an embedding is adapted, or the vocabulary was resized.
    """
    if not (isinstance(save, bool) or save == "auto"):
        raise ValueError(f'save_embedding_layers: got {save!r}, wanted True, False or "auto"')
    targeted = _targeted(model, config)
    tokens = getattr(config, "trainable_token_indices", None) is not None
    if save == "auto":
        save = (targeted and not tokens) or resized(model)
    found = standing(model) if save else {}
    return {path: tensor for path, tensor in found.items() if not targeted or ".base_layer." in path}


def standing(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base tensors of the input and output embedding, by the path they have in PEFT's model."""
    return base_tensors(model, {path: _inside(module) for path, module in embedding_pair(model)})


def _targeted(model: nn.Module, config: AdapterConfig) -> bool:
    targets = config.target_modules
    if not isinstance(targets, str):
        return any(name in NAMES for name in targets or [])
    paths = [path for path, _ in walk(model) if path.rpartition(".")[2] in NAMES]
    return targets.lower() != "all-linear" and any(re.fullmatch(targets, path) for path in paths)


def _inside(module: nn.Module) -> str:
    """Where PEFT's model holds the base module that ``module`` stands for."""
    if isinstance(module, AdapterLinear):
        return "base_layer."
    if isinstance(module, TrainedCopy):
        return "original_module."
    return "token_adapter.base_layer." if isinstance(module, TrainedTokens) else ""


def base_tensors(model: nn.Module, inside: dict[str, str]) -> dict[str, torch.Tensor]:
    """The base tensors of modules by the path they have in PEFT's model; ``inside``: see :func:`_inside`."""
    return {
        f"{path}.{middle}{key}": tensor
        for path, middle in inside.items()
        for key, tensor in original(model.get_submodule(path)).state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
