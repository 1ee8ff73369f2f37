"""Adapter files in PEFT's format: adapter_model.safetensors and adapter_config.json. Nothing here unpickles anything.

A file of ours says in the safetensors metadata, which PEFT ignores, what wrote it and a few values of each adapted base
weight, so that loading onto another base is an error. Loading checks everything before it touches the model.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops._version import __version__
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.choice import embeddings
from spectral_ops.adapters.choice.targets import Choice, choose, is_all_linear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.files.given_state import given, standing_in
from spectral_ops.adapters.files.saved_config import CONFIG, modern_key, read_config, refuse_older_packing
from spectral_ops.adapters.files.tensors import (
    PARTLY,
    PREFIX,
    adapter_tensors,
    biases,
    check_sample,
    compare,
    drop_twins,
    fill_adapter,
    refuse_shards,
    sample,
    shared,
    with_adapter,
)
from spectral_ops.adapters.methods import layer_class, layer_type, linear_sizes
from spectral_ops.adapters.model import attach_adapter, refuse_peft, taken_back
from spectral_ops.adapters.tree import active_adapter, adapter_configs, unwrap

WEIGHTS = "adapter_model.safetensors"
ROWS = "token_adapter.trainable_tokens_delta"
FORMAT = 1  # of the metadata below; a higher one comes from a later version


# --- save ------------------------------------------------------------------------------------------------------------


def save_adapter(model, directory, adapter_name=None, *, plain=True, save_embedding_layers="auto", state_dict=None):
    """Write an adapter as PEFT does, into ``directory``/adapter_model.safetensors and adapter_config.json.

    adapter_name: default, the active one. plain: write PiSSA and MiLoRA as LoRA of rank 2r, which PEFT (and anyone)
    loads onto the original base; False keeps the trained form, to go on training it with :func:`load_adapter`.
    save_embedding_layers: write the base embeddings too; "auto" does where one of them is adapted, or where the
    vocabulary differs from that in the base model's folder. state_dict: tensors by their names in
    ``model.state_dict()`` to write in place of the model's own, such as those gathered from shards. ValueError where
    it lacks what the adapter trains.
    """
    root = unwrap(model)
    configs = adapter_configs(root)
    name = adapter_name or active_adapter(root)
    if name not in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(configs)}")
    layers = with_adapter(root, name)
    with standing_in(root, {} if state_dict is None else given(model, root, name, state_dict)):
        refuse_shards(layers)
        tensors = adapter_tensors(root, name, plain=plain, save_embedding_layers=save_embedding_layers)
        samples = {path: taken for path, layer in layers.items() if (taken := sample(layer))}
    if places := shared(root, layers):
        warnings.warn(f"{PARTLY.format(*places)}: it will not compute the same from this file", stacklevel=2)
    fields = config_fields(root, configs[name].for_file(plain), layers)
    note = {"format": FORMAT, "version": __version__, "method": type(next(iter(layers.values()))).__name__}
    metadata = {"format": "pt", "spectral_ops": json.dumps({**note, "base": samples})}
    save = _safetensors().torch.save_file
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS, lambda path: save(tensors, path, metadata=metadata))
    _write(directory / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2, sort_keys=True)))


def config_fields(root: nn.Module, config: AdapterConfig, layers: dict[str, AdapterLinear]) -> dict[str, Any]:
    """The content of adapter_config.json."""
    fields = config.peft_fields()
    if is_all_linear(config.target_modules) or (config.exclude_modules and "exclude_modules" not in fields):
        fields["target_modules"] = list(layers)
    if any(layer.transposed for layer in layers.values()) and "fan_in_fan_out" in config.peft_idle:
        fields["fan_in_fan_out"] = True
    fields["inference_mode"] = True
    fields["base_model_name_or_path"] = embeddings.base_name(root)
    if config.task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return fields


# --- load ------------------------------------------------------------------------------------------------------------


def load_adapter(
    model, directory, adapter_name="default", *, autocast_adapter_dtype=True, trainable=True, check_base=True
):
    """Attach the adapter of ``directory`` (ours or PEFT's) to ``model`` and make it active; returns the model.

    trainable: leave its parameters trainable. check_base: raise if the base weights are not those the adapter was saved
    with (files of ours say; pass False for a quantised or deliberately changed base). Base embeddings that the file
    holds are copied into the model, as PEFT does.

    Raises FileNotFoundError/ValueError saying what is wrong with which file or tensor, and leaves the model untouched.
    """
    directory, root = Path(directory), unwrap(model)
    refuse_peft(root)
    config = read_config(directory)
    tensors, note = _read_tensors(directory / WEIGHTS)
    refuse_older_packing(directory)
    try:
        choice = choose(root, config, loading=True)
        sized = choice.config.for_model(linear_sizes(choice.layers))
    except ValueError as error:
        raise ValueError(f"{directory}: the adapter does not fit this model: {error}") from None
    if not note and (places := shared(root, choice.layers)):
        raise ValueError(f"{directory}: {PARTLY.format(*places)}, wanted a model without that, or a file of ours")
    base = _base_tensors(root, choice)
    skipped = tuple(f"{PREFIX}{path}." for path in choice.skipped)
    tensors = {key: tensor for key, tensor in tensors.items() if not (skipped and key.startswith(skipped))}
    drop_twins(tensors, choice.copies, choice.tokens, choice.tied_tokens)
    initial = _check(directory, root, choice, sized, tensors, note if check_base else {}, base)
    search = config.changes_base and not initial  # PEFT's own PiSSA file: the start is computed again, as PEFT does
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "initialise": search, "commit": search}
    with taken_back(root, adapter_name), torch.no_grad():
        attach_adapter(model, choice, adapter_name, **options)
        fill_adapter(root, adapter_name, tensors)
        for key, tensor in base.items():
            if key in tensors:
                tensor.copy_(tensors[key])
    if not trainable:
        root.requires_grad_(False)
    return model


def _base_tensors(root: nn.Module, choice: Choice) -> dict[str, torch.Tensor]:
    """The base tensors that a file may hold beside the adapter, by their keys there."""
    inside = {path: "" for path, _ in embeddings.embedding_pair(root)} | dict.fromkeys(
        choice.copies, "original_module."
    )
    inside |= dict.fromkeys((*choice.tokens, *choice.tied_tokens), "token_adapter.base_layer.")
    inside |= {path: "base_layer." for path in inside if path in choice.layers}
    return {f"{PREFIX}{path}": tensor for path, tensor in embeddings.base_tensors(root, inside).items()}


def _check(
    directory: Path, root: nn.Module, choice: Choice, sized: AdapterConfig, tensors: dict[str, torch.Tensor],
    note: dict[str, Any], base: dict[str, torch.Tensor],
) -> bool:  # fmt: skip
    """Raise ValueError where the file's tensors are not those of the adapter on this model.

    Returns whether they hold the pair that the adapter started from.
    """
    file, config, method = directory / WEIGHTS, choice.config, layer_type(choice.config)
    initial = any(key.endswith(suffix) for key in tensors for suffix in method.initial_keys.values())
    expected: dict[str, torch.Size] = {}
    integers: dict[str, torch.dtype] = {}
    for path, module in choice.layers.items():
        layer = module if isinstance(module, AdapterLinear) else layer_class(config, module)(module)
        try:
            settings = layer.fitted(sized, path)
            indices = layer.indices(settings)
            shapes = layer.tensor_shapes(settings, initial) | indices
        except ValueError as error:
            raise ValueError(f"{directory}: the adapter does not fit this model: {path}: {error}") from None
        names = {
            key: method.file_key(path, suffix)
            for key, suffix in layer.suffixes(settings).items()
            if key not in config.unsaved
        }
        integers |= {names[key]: torch.int32 for key in indices}
        expected |= {names[key]: torch.Size(shape) for key, shape in shapes.items() if key in names}
        if path in note.get("base", {}):
            check_sample(directory, path, layer, note["base"][path])
    own = biases(root, config, choice.layers)
    if own and not any(key in tensors for key in own):
        why = f"{file}: no biases, though bias={config.bias!r} trains them (PEFT 0.18 leaves some out)"
        warnings.warn(f"{why}; the model's own stay", stacklevel=3)
        own = {}
    expected |= {key: bias.shape for key, bias in own.items()}
    for path, module in choice.copies.items():
        for key, value in embeddings.original(module).state_dict().items():
            expected[f"{PREFIX}{path}.{key}"] = value.shape
            integers |= {} if value.is_floating_point() else {f"{PREFIX}{path}.{key}": value.dtype}
    for path, rows in choice.tokens.items():
        width = embeddings.original(root.get_submodule(path)).weight.shape[1]
        expected[f"{PREFIX}{path}.{ROWS}"] = torch.Size([len(rows), width])
    compare(file, tensors, expected, {key: tensor.shape for key, tensor in base.items()})
    for key, tensor in tensors.items():
        if not (tensor.dtype is integers[key] if key in integers else tensor.is_floating_point()):
            raise ValueError(f"{file}: got {key} {tensor.dtype}, wanted {integers.get(key, 'floating-point tensors')}")
        if key not in integers and not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: got {key} with values that are not finite, wanted finite ones")
    for path, size in linear_sizes(choice.layers).items():
        names = {key: method.file_key(path, s) for key, s in (method.tensor_keys | method.index_keys).items()}
        found = {key: tensors[name] for key, name in names.items() if name in tensors}
        try:
            method.check_tensors(config.for_layer(path), *size, found)
        except (IndexError, ValueError) as error:
            raise type(error)(f"{file}: {path}: {error}") from None
    return initial


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a safetensors file, and our note in its metadata."""
    safetensors = _safetensors()
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        why = " (adapter_model.bin is a pickle, which is never loaded: save it again as safetensors)" if pickled else ""
        raise FileNotFoundError(f"directory: got {str(path.parent)!r}, wanted one that holds {path.name}{why}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            note = json.loads((file.metadata() or {}).get("spectral_ops", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: got a truncated or damaged file ({error}), wanted safetensors") from None
    form = note.get("format", FORMAT) if isinstance(note, dict) else None
    if not isinstance(form, int) or form > FORMAT or not isinstance(note.get("base", {}), dict):
        raise ValueError(f"{path}: got format {note!r:.60}, wanted at most {FORMAT} (a later spectral_ops wrote it)")
    return {modern_key(key): tensor for key, tensor in tensors.items()}, note
