"""Adapter files in PEFT's format: adapter_model.safetensors and adapter_config.json. Nothing here unpickles anything.

A file of ours says in the safetensors metadata, which PEFT ignores, what wrote it and a few values of each adapted base
weight, so that loading onto another base is an error. Loading checks everything before it touches the model.
"""

from __future__ import annotations

import base64
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops._version import __version__
from spectral_ops.adapters import embeddings
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.frozen import linear_size
from spectral_ops.adapters.given_state import given, standing_in
from spectral_ops.adapters.methods import layer_type
from spectral_ops.adapters.model import attach_adapter, taken_back
from spectral_ops.adapters.saved_config import CONFIG, modern_key, read_config
from spectral_ops.adapters.targets import Choice, choose, is_all_linear
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens
from spectral_ops.adapters.tree import Unit, adapter_configs, adapter_layers, elsewhere, units, unwrap, walk

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
FORMAT = 1  # of the metadata below; a higher one comes from a later version
SAMPLES = 16


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
    name = adapter_name or next((unit.active for unit in units(root).values() if unit.active), None)
    if name not in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(configs)}")
    layers = _layers(root, name)
    with standing_in(root, {} if state_dict is None else given(model, root, name, state_dict)):
        tensors = adapter_tensors(root, name, plain=plain, save_embedding_layers=save_embedding_layers)
        samples = {path: sample for path, layer in layers.items() if (sample := _sample(layer))}
    if shared := _shared(root, layers):
        warnings.warn(f"{_PARTLY.format(*shared)}: it will not compute the same from this file", stacklevel=2)
    fields = _fields(root, configs[name].for_file(plain), layers)
    note = {"format": FORMAT, "version": __version__, "method": type(next(iter(layers.values()))).__name__}
    metadata = {"format": "pt", "spectral_ops": json.dumps({**note, "base": samples})}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save = _safetensors().torch.save_file
    _write(directory / WEIGHTS, lambda path: save(tensors, path, metadata=metadata))
    _write(directory / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2, sort_keys=True)))


_PARTLY = "the layer {!r} is also {!r}, and PEFT adapts only the first of these"


def _shared(root: nn.Module, layers) -> tuple[str, str] | None:
    """The two paths of an adapted layer that hangs under two parents; None where there is none."""
    count: dict[int, int] = {}
    for _, parent in walk(root):
        for child in map(id, parent._modules.values()) if not isinstance(parent, Unit) else ():
            count[child] = count.get(child, 0) + 1
    suspects = [path for path in layers if count.get(id(root.get_submodule(path)), 0) > 1]
    return next(((path, other) for path in suspects if (other := elsewhere(root, path))), None)


def adapter_tensors(model, name: str, *, plain=True, save_embedding_layers="auto") -> dict[str, torch.Tensor]:
    """What a file holds of adapter ``name``, by its keys there: copies on the CPU."""
    root = unwrap(model)
    layers, others = held_tensors(root, name, plain)
    base = embeddings.travelling(root, adapter_configs(root)[name], save_embedding_layers)
    others |= {f"{PREFIX}{path}": tensor for path, tensor in base.items()}
    tensors = {key: tensor for group in (*layers.values(), others) for key, tensor in group.items()}
    return {key: _whole(tensor.detach()).cpu().clone().contiguous() for key, tensor in tensors.items()}


def held_tensors(
    root: nn.Module, name: str, plain=False
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What a file holds of an adapter, under the file's keys: of each layer, and what else trains with it.

    In the trained form, which is not ``plain``, the memory is the model's own.
    """
    held = {
        path: {layer.file_key(path, suffix): t for suffix, t in layer.file_tensors(name, plain).items()}
        for path, layer in _layers(root, name).items()
    }
    return held, _beside(root, name)


def _layers(root: nn.Module, name: str) -> dict[str, AdapterLinear]:
    return {path: layer for path, layer in adapter_layers(root).items() if name in layer.settings}


def _beside(root: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What trains with the layers of adapter ``name``, by its keys in the file: biases, copies, rows."""
    found = _biases(root, adapter_configs(root)[name], _layers(root, name))
    for path, unit in units(root).items():
        if isinstance(unit, TrainedCopy) and name in unit.copies:
            found |= {f"{PREFIX}{path}.{key}": t for key, t in unit.copies[name].state_dict().items()}
        if isinstance(unit, TrainedTokens):
            found |= {f"{PREFIX}{path}.{key}": t for key, t in unit.file_tensors(name).items()}
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, which every process must take part in; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _fields(root: nn.Module, config: AdapterConfig, layers: dict[str, AdapterLinear]) -> dict[str, Any]:
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


def _biases(root: nn.Module, config: AdapterConfig, chosen) -> dict[str, torch.Tensor]:
    """The base biases that train under ``config``, by their key in PEFT's file; ``chosen`` are the adapted paths."""
    found, beside = {}, (TrainedCopy, TrainedTokens)
    for path, module in walk(root) if config.bias != "none" else ():
        base = module.base_layer if isinstance(module, AdapterLinear) else module
        bias = base._parameters.get("bias")
        if bias is not None and (path in chosen or config.bias == "all") and not isinstance(module, beside):
            found[f"{PREFIX}{path}{'.base_layer' if path in chosen else ''}.bias"] = bias
    return found


def _sample(layer: AdapterLinear) -> str | None:
    """Evenly spaced values of the original base weight; None for a weight that is not dense."""
    try:
        layer.dense_matrix("the fingerprint")
    except ValueError:
        return None
    with torch.no_grad():
        weight = layer.original_weight() if layer.changed else layer.matrix
        return base64.b64encode(struct.pack(f"<{SAMPLES}f", *_values(weight))).decode()


def _values(weight: torch.Tensor) -> list[float]:
    index = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long().to(weight.device)
    return weight[index // weight.shape[1], index % weight.shape[1]].float().tolist()


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
    config = read_config(directory)
    tensors, note = _read_tensors(directory / WEIGHTS)
    try:
        choice = choose(root, config, loading=True)
        sized = choice.config.for_model({path: linear_size(module) for path, module in choice.layers.items()})
    except ValueError as error:
        raise ValueError(f"{directory}: the adapter does not fit this model: {error}") from None
    if not note and (shared := _shared(root, choice.layers)):
        raise ValueError(f"{directory}: {_PARTLY.format(*shared)}, wanted a model without that, or a file of ours")
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


@torch.no_grad()
def fill_adapter(model, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give adapter ``name`` of ``model`` the tensors of a file, by their keys there, in the form that is trained.

    Where an initialisation moved a part of the base into the adapter, and the file's is another than the model's, the
    base gets its own part back and gives up the file's.
    """
    root = unwrap(model)
    for path, layer in _layers(root, name).items():
        layer.release()
        own = {layer.file_key(path, suffix): getattr(layer, key)[name] for key, suffix in layer.saved(name).items()}
        starts = {layer.file_key(path, suffix): getattr(layer, key) for key, suffix in layer.initial_keys.items()}
        given = bool(starts) and all(key in tensors for key in starts)
        known = given and all(name in held for held in starts.values())
        moved = known and any(not torch.equal(tensors[key].to(held[name]), held[name]) for key, held in starts.items())
        if moved:
            layer.restore()
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        if given and (moved or not known):
            layer.set_initial(name, *(tensors[key] for key in starts))
            layer.commit(name)
    for key, tensor in _beside(root, name).items():
        if key in tensors:  # else a bias that stays the model's: see _check
            tensor.copy_(tensors[key])


def _base_tensors(root: nn.Module, choice: Choice) -> dict[str, torch.Tensor]:
    """The base tensors that a file may hold beside the adapter, by their keys there."""
    inside = {path: "" for path, _ in embeddings.embedding_pair(root)} | dict.fromkeys(
        choice.copies, "original_module."
    )
    inside |= dict.fromkeys((*choice.tokens, *choice.tied_tokens), "token_adapter.base_layer.")
    inside |= {path: "base_layer." for path in inside if path in choice.layers}
    return {f"{PREFIX}{path}": tensor for path, tensor in embeddings.base_tensors(root, inside).items()}


def drop_twins(tensors: dict[str, torch.Tensor], copies, tokens, tied_tokens) -> None:
    """Forget what PEFT wrote a second time: whole wrappers with an embedding or a bias, and what is tied."""
    twins = [f"{PREFIX}{path}.modules_to_save." for path in copies]
    twins += [f"{PREFIX}{path}.token_adapter.trainable_tokens_original" for path in tokens]
    twins += [f"{PREFIX}{path}.token_adapter.trainable_tokens_" for path in tied_tokens]
    for key in [key for key in tensors if key.startswith(tuple(twins))] if twins else ():
        del tensors[key]


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
        layer = module if isinstance(module, AdapterLinear) else method(module)
        try:
            sizes = sized.for_layer(path), layer.out_features, layer.in_features
            indices = method.index_shapes(*sizes)
            shapes = method.shapes(*sizes) | indices | (method.initial_shapes(*sizes) if initial else {})
        except ValueError as error:
            raise ValueError(f"{directory}: the adapter does not fit this model: {path}: {error}") from None
        names = {
            key: method.file_key(path, suffix)
            for key, suffix in (method.tensor_keys | method.index_keys | method.initial_keys).items()
            if key not in config.unsaved
        }
        integers |= {names[key]: torch.int32 for key in indices}
        expected |= {names[key]: torch.Size(shape) for key, shape in shapes.items() if key in names}
        if path in note.get("base", {}):
            _check_sample(directory, path, layer, note["base"][path])
    biases = _biases(root, config, choice.layers)
    if biases and not any(key in tensors for key in biases):
        why = f"{file}: no biases, though bias={config.bias!r} trains them (PEFT 0.18 leaves some out)"
        warnings.warn(f"{why}; the model's own stay", stacklevel=3)
        biases = {}
    expected |= {key: bias.shape for key, bias in biases.items()}
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
    for path, module in choice.layers.items():
        size = linear_size(module)
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


def compare(
    path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size], allowed: dict[str, torch.Size]
) -> None:
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected and key not in allowed]
    shapes = {
        key: f"{list(tensors[key].shape)}, wanted {list(shape)}"
        for key, shape in {**allowed, **expected}.items()
        if key in tensors and tensors[key].shape != shape
    }
    if missing:
        raise ValueError(f"{path}: got no {_some(missing)}, wanted every tensor of the adapter on this model")
    if extra:
        raise ValueError(f"{path}: got {_some(extra)}, wanted no tensor that the adapter on this model lacks")
    resized = [key for key in shapes if key in allowed and tensors[key].dim() == len(allowed[key]) == 2]
    if resized:
        rows = tensors[resized[0]].shape[0]
        hint = f"resize_token_embeddings({rows}) gives the model as many rows as the adapter was trained with"
        raise ValueError(f"{path}: got {_some({k: shapes[k] for k in resized})} ({hint})")
    if shapes:
        raise ValueError(f"{path}: got {_some(shapes)} (rank and this model's layers)")


def _some(items) -> str:
    shown = [f"{key} {value}" for key, value in items.items()] if isinstance(items, dict) else list(items)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _check_sample(directory: Path, path: str, layer: AdapterLinear, saved: str) -> None:
    """Compare the base weight with what the file says of it, up to the rounding between floating dtypes."""
    now = _sample(layer)
    if now is None:
        return
    try:
        was, is_ = (torch.tensor(struct.unpack(f"<{SAMPLES}f", base64.b64decode(s))) for s in (saved, now))
    except (TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{directory / WEIGHTS}: got a damaged note on {path!r} ({error}), wanted values") from None
    slack = 2**-8 * was.square().mean().sqrt().item()
    if not torch.allclose(is_, was, rtol=2**-8, atol=slack):
        raise ValueError(
            f"{directory}: got a model whose {path!r} has other base weights than the adapter was trained on, wanted"
            " that base (check_base=False loads it all the same)"
        )
