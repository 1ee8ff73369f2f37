"""Adapter files in PEFT's format: adapter_model.safetensors and adapter_config.json. Nothing here unpickles anything.

A file of ours says in the safetensors metadata, which PEFT ignores, what wrote it and a few values of each adapted base
weight, so that loading onto another base is an error. Loading checks everything before it touches the model.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops._version import __version__
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.frozen import linear_size
from spectral_ops.adapters.methods import METHODS, config_type, layer_type
from spectral_ops.adapters.model import attach_adapter
from spectral_ops.adapters.targets import modules_to_save, targets
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.tree import adapter_configs, adapter_layers, units, unwrap, walk

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
FORMAT = 1  # of the metadata below; a higher one comes from a later version
SAMPLES = 16
# fields of PEFT's configs that say nothing about the tensors, or that config_type() has already read
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip


# --- save ------------------------------------------------------------------------------------------------------------


def save_adapter(model, directory, adapter_name=None, *, plain=True):
    """Write an adapter as PEFT does, into ``directory``/adapter_model.safetensors and adapter_config.json.

    adapter_name: default, the active one. plain: write PiSSA and MiLoRA as LoRA of rank 2r, which PEFT (and anyone)
    loads onto the original base; False keeps the trained form, to go on training it with :func:`load_adapter`.
    """
    safetensors = _safetensors()
    root = unwrap(model)
    configs = adapter_configs(root)
    name = adapter_name or next((unit.active for unit in units(root).values() if unit.active), None)
    if name not in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(configs)}")
    config = configs[name].for_file(plain)
    layers = {path: layer for path, layer in adapter_layers(root).items() if name in layer.settings}
    tensors = {
        layer.file_key(path, suffix): tensor
        for path, layer in layers.items()
        for suffix, tensor in layer.file_tensors(name, plain).items()
    }
    tensors |= _biases(root, config, layers)
    for path, unit in units(root).items():
        if isinstance(unit, TrainedCopy) and name in unit.copies:
            tensors |= {f"{PREFIX}{path}.{key}": t for key, t in unit.copies[name].state_dict().items()}
    fields = config.peft_fields()
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        fields["target_modules"] = list(layers)
    if any(layer.transposed for layer in layers.values()):
        fields["fan_in_fan_out"] = True
    fields["inference_mode"] = True
    fields["base_model_name_or_path"] = getattr(getattr(root, "config", None), "_name_or_path", None) or None
    note = {"format": FORMAT, "version": __version__, "method": type(next(iter(layers.values()))).__name__}
    note["base"] = {path: sample for path, layer in layers.items() if (sample := _sample(layer))}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", "spectral_ops": json.dumps(note)}
    _write(directory / WEIGHTS, lambda path: safetensors.torch.save_file(contiguous, path, metadata=metadata))
    _write(directory / CONFIG, lambda path: path.write_text(json.dumps(fields, indent=2, sort_keys=True)))


def _biases(root: nn.Module, config: AdapterConfig, chosen) -> dict[str, torch.Tensor]:
    """The base biases that train under ``config``, by their key in PEFT's file; ``chosen`` are the adapted paths."""
    found = {}
    for path, module in walk(root) if config.bias != "none" else ():
        base = module.base_layer if isinstance(module, AdapterLinear) else module
        bias = base._parameters.get("bias")
        if bias is not None and (path in chosen or config.bias == "all") and not isinstance(module, TrainedCopy):
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
    with (files of ours say; pass False for a quantised or deliberately changed base).

    Raises FileNotFoundError/ValueError saying what is wrong with which file or tensor, and leaves the model untouched.
    """
    directory, root = Path(directory), unwrap(model)
    config = read_config(directory)
    method = layer_type(config)
    tensors, note = _read_tensors(directory / WEIGHTS)
    try:
        chosen, copied = targets(root, config), modules_to_save(root, config)
        sized = config.for_model({path: linear_size(module) for path, module in chosen.items()})
    except ValueError as error:
        raise ValueError(f"{directory}: the adapter does not fit this model: {error}") from None
    initial = any(key.endswith(suffix) for key in tensors for suffix in method.initial_keys.values())
    expected: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, module in chosen.items():
        layer = module if isinstance(module, AdapterLinear) else method(module)
        sizes = sized.for_layer(path), layer.out_features, layer.in_features
        indices = method.index_shapes(*sizes)
        shapes = method.shapes(*sizes) | indices | (method.initial_shapes(*sizes) if initial else {})
        names = {
            key: method.file_key(path, suffix)
            for key, suffix in (method.tensor_keys | method.index_keys | method.initial_keys).items()
            if key not in config.unsaved
        }
        dtypes |= {names[key]: torch.int32 for key in indices}
        expected |= {names[key]: torch.Size(shape) for key, shape in shapes.items() if key in names}
        if check_base and path in note.get("base", {}):
            _check_sample(directory, path, layer, note["base"][path])
    for key, tensor in tensors.items():
        if key in expected and not (tensor.dtype == dtypes[key] if key in dtypes else tensor.is_floating_point()):
            wanted = f"{dtypes[key]}" if key in dtypes else "floating-point tensors"
            raise ValueError(f"{directory / WEIGHTS}: got {key} {tensor.dtype}, wanted {wanted}")
    biases = _biases(root, config, chosen)
    expected |= {key: bias.shape for key, bias in biases.items()}
    for path, module in copied.items():
        module = module.original_module if isinstance(module, TrainedCopy) else module
        expected |= {f"{PREFIX}{path}.{key}": value.shape for key, value in module.state_dict().items()}
    _compare(directory / WEIGHTS, tensors, expected)
    for path, module in chosen.items():
        layer = module if isinstance(module, AdapterLinear) else method(module)
        names = {key: method.file_key(path, s) for key, s in (method.tensor_keys | method.index_keys).items()}
        found = {key: tensors[name] for key, name in names.items() if name in tensors}
        try:
            method.check_tensors(config.for_layer(path), layer.out_features, layer.in_features, found)
        except (IndexError, ValueError) as error:
            raise type(error)(f"{directory / WEIGHTS}: {path}: {error}") from None

    search = config.changes_base and not initial  # PEFT's own PiSSA file: the start is computed again, as PEFT does
    attach_adapter(
        model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, initialise=search, commit=search
    )
    with torch.no_grad():
        for path in chosen:
            _fill(root.get_submodule(path), adapter_name, path, tensors, initial)
        for path in copied:
            copy = root.get_submodule(path).copies[adapter_name]
            copy.load_state_dict({key: tensors[f"{PREFIX}{path}.{key}"] for key in copy.state_dict()})
        for key, bias in biases.items():
            bias.copy_(tensors[key])
    if not trainable:
        root.requires_grad_(False)
    return model


def _fill(layer: AdapterLinear, name: str, path: str, tensors: dict[str, torch.Tensor], initial: bool) -> None:
    for key, suffix in layer.held(name).items():
        if key not in layer.settings[name].unsaved:
            getattr(layer, key)[name].copy_(tensors[layer.file_key(path, suffix)])
    if initial:
        layer.set_initial(name, *(tensors[layer.file_key(path, suffix)] for suffix in layer.initial_keys.values()))
        layer.commit(name)


def read_config(directory) -> AdapterConfig:
    """The config in ``directory``/adapter_config.json; ValueError where it is damaged or asks for what we lack."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"directory: got {str(directory)!r}, wanted one that holds {CONFIG}")
    try:
        fields: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: got invalid JSON ({error}), wanted an adapter's configuration") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got a JSON {type(fields).__name__}, wanted an object")
    config = config_type(fields)
    if config is None:
        known = sorted({method.config_type.peft_type for method in METHODS})
        raise ValueError(f"{path}: peft_type: got {fields.get('peft_type')!r}, wanted one of {known}")
    names = set(config.__dataclass_fields__) | IGNORED | set(config.peft_flags) | config.peft_ignored
    unknown = {name: value for name, value in fields.items() if name not in names and value}
    if unknown:
        raise ValueError(f"{path}: got {unknown}, wanted these off: this package does not have them")
    try:
        return config.from_peft(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


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
    if not isinstance(note, dict) or note.get("format", FORMAT) > FORMAT:
        raise ValueError(f"{path}: got format {note!r:.60}, wanted at most {FORMAT} (a later spectral_ops wrote it)")
    renamed = {key.removesuffix(".weight") if "lora_magnitude_vector" in key else key: t for key, t in tensors.items()}
    return renamed, note


def _compare(path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> None:
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = {
        key: f"{list(tensors[key].shape)}, wanted {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    }
    if missing:
        raise ValueError(f"{path}: got no {_some(missing)}, wanted every tensor of the adapter on this model")
    if extra:
        raise ValueError(f"{path}: got {_some(extra)}, wanted no tensor that the adapter on this model lacks")
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
    was, is_ = (torch.tensor(struct.unpack(f"<{SAMPLES}f", base64.b64decode(s))) for s in (saved, now))
    slack = 2**-8 * was.square().mean().sqrt().item()
    if not torch.allclose(is_, was, rtol=2**-8, atol=slack):
        raise ValueError(
            f"{directory}: got a model whose {path!r} has other base weights than the adapter was trained on, wanted"
            " that base (check_base=False loads it all the same)"
        )
