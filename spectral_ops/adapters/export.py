"""A LoRA adapter in the form that a server wants, where that is not PEFT's (see io.py).

vLLM reads the experts of most mixtures (Mixtral, Qwen3-MoE, DeepSeek, OLMoE and others of its FusedMoEWithLoRA) as the
linear layers they were before transformers 5: one pair for each of gate, up and down of every expert, under the names
of the checkpoint, all of them or none, with one scale and one rank bound for the whole file. PEFT with transformers
before 5 reads the same. For its models of stacked experts (FusedMoE3DWithLoRA: gpt-oss, Qwen3.5) vLLM reads the file
that save_adapter writes of an adapter with both stacks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops.adapters.choice.experts import checkpoint_names
from spectral_ops.adapters.experts import LoRAExperts
from spectral_ops.adapters.files.saved_config import CONFIG
from spectral_ops.adapters.files.tensors import PREFIX, beside, refuse_shards, whole, with_adapter
from spectral_ops.adapters.io import WEIGHTS, config_fields
from spectral_ops.adapters.lora import LoRAConfig
from spectral_ops.adapters.tree import active_adapter, adapter_configs, unwrap

LAYOUTS = ("vllm",)
Pair = tuple[torch.Tensor, torch.Tensor, float]  # A [r, in], B [out, r], γ


def export_adapter(model, directory, adapter_name=None, *, layout="vllm"):
    """Write a LoRA adapter for a server, into ``directory``/adapter_model.safetensors and adapter_config.json.

    adapter_name: default, the active one. layout: "vllm", which has a pair for every expert and projection
    (``experts.0.gate_proj.lora_A.weight``, Mixtral's ``experts.0.w1``); gate and up share A and have a half of B each,
    a projection that is not adapted gets zeros. Every pair has one rank and one scale: lower ranks are filled up with
    zeros, other scales are in B. PiSSA and MiLoRA are written as plain LoRA. Such a file is not read back by
    :func:`load_adapter`, which takes save_adapter's.

    Raises ValueError for another layout or name, and where the adapter trains what is no pair (modules_to_save, rows of
    embeddings, biases), which servers do not load; TypeError for a method other than LoRA.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, wanted one of {', '.join(map(repr, LAYOUTS))}")
    root = unwrap(model)
    configs = adapter_configs(root)
    name = adapter_name or active_adapter(root)
    if name not in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(configs)}")
    config, layers = configs[name], with_adapter(root, name)
    if type(config) is not LoRAConfig:
        raise TypeError(f"adapter_name: got {name!r}, a {type(config).__name__}, wanted a LoRAConfig")
    if others := beside(root, name):
        raise ValueError(f"adapter_name: got {name!r}, which trains {next(iter(others))} too, wanted pairs alone")
    refuse_shards(layers)
    pairs: dict[str, Pair] = {}
    for path, layer in layers.items():
        if isinstance(layer, LoRAExperts):
            pairs |= _each_expert(layer, name, *checkpoint_names(root, path))
        else:
            tensors = layer.file_tensors(name, plain=True)
            A, B = (whole(tensors[layer.tensor_keys[key]]) for key in ("lora_A", "lora_B"))
            pairs[path] = A, B, layer.scale(name)
    rank = max(A.shape[0] for A, _, _ in pairs.values())
    saved = dataclasses.replace(
        config, r=rank, lora_alpha=config.scaling * rank, use_rslora=False, rank_pattern={}, alpha_pattern={},
        target_parameters=None, target_modules=sorted({path.rpartition(".")[2] for path in pairs}),
        init_lora_weights=True, exclude_modules=None, layers_to_transform=None, layers_pattern=None,
    )  # fmt: skip
    tensors = {}
    for path, (A, B, scale) in pairs.items():
        B = B if scale == config.scaling else B * (scale / config.scaling)
        missing = rank - A.shape[0]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = _copy(F.pad(A, (0, 0, 0, missing)))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = _copy(F.pad(B, (0, missing)))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save, fields = _safetensors().torch.save_file, config_fields(root, saved, {})
    _write(directory / WEIGHTS, lambda path: save(tensors, path, metadata={"format": "pt"}))
    _write(directory / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2, sort_keys=True)))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _each_expert(layer: LoRAExperts, name: str, path: str, names: dict[str, str]) -> dict[str, Pair]:
    """The pairs of every expert as linear layers, by their paths; ``names`` of gate, up and down in the checkpoint."""
    adapted = {side: tuple(map(whole, layer.linear_pair(side, name))) for side in layer.scales[name]}
    rank = max(A.shape[1] for A, _ in adapted.values())
    found: dict[str, Pair] = {}
    for side in layer.sides:
        d, k = layer.linear_size(side)
        if side in adapted:
            (A, B), scale = adapted[side], layer.scales[name][side]
        else:
            like = next(iter(adapted.values()))[0]
            A, B = like.new_zeros(layer.num_experts, rank, k), like.new_zeros(layer.num_experts, d, rank)
            scale = layer.settings[name].scaling
        parts = {"down": B} if side == "down" else layer.split(B)
        for part, rows in parts.items():
            for e in range(layer.num_experts):
                found[f"{path}.{e}.{names[part]}"] = A[e], rows[e], scale
    return found
