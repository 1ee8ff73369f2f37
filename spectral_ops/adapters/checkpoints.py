"""The adapters of a model as a folder, as PEFT and transformers' Trainer write and look for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops.adapters.io import PREFIX, WEIGHTS, _biases, _compare, save_adapter
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.tree import adapter_configs, adapter_layers, units, unwrap

WHOLE = "model.safetensors"  # the only name under which Trainer looks for the checkpoint of what is no PeftModel
SEVERAL = "adapters."  # before an adapter's name and key, where that file holds more than one


def folder_of(directory, name: str) -> Path:
    """Where PEFT puts an adapter: "default" into the folder itself, any other into one of its name there."""
    return Path(directory) if name == "default" else Path(directory) / name


def save_adapters(model: nn.Module, directory, names=None, *, plain=False, **options) -> list[str]:
    """Write adapters (default: all) as PEFT lays them out, in the form that is trained unless ``plain``.

    options: of :func:`save_adapter`. Returns the names. Raises ValueError for names that the model does not have.
    """
    if os.path.isfile(directory):
        raise ValueError(f"save_directory: got the file {str(directory)!r}, wanted a folder")
    known = adapter_configs(unwrap(model))
    names = list(known) if names is None else list(names)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"selected_adapters: got {missing}, wanted names of {sorted(known)}")
    for name in names:
        save_adapter(model, folder_of(directory, name), name, plain=plain, **options)
    return names


def leave_whole_file(directory: Path, names: list[str]) -> None:
    """Write what Trainer resumes from: for one adapter, that adapter's file under a second name."""
    safetensors = _safetensors()
    files = {name: folder_of(directory, name) / WEIGHTS for name in names}

    def link(path: Path) -> None:
        (file,) = files.values()
        try:
            os.link(file, path)
        except OSError:  # a file system without links
            shutil.copyfile(file, path)

    def gather(path: Path) -> None:
        held = {name: safetensors.torch.load_file(file) for name, file in files.items()}
        tensors = {f"{SEVERAL}{name}.{key}": tensor for name, file in held.items() for key, tensor in file.items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    _write(directory / WHOLE, link if len(names) == 1 else gather)


def in_whole_file(state: dict[str, torch.Tensor], active: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each adapter in what :func:`leave_whole_file` wrote; empty for any other state."""
    if active is not None and state and all(key.startswith(PREFIX) for key in state):
        return {active: state}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, rest = key.removeprefix(SEVERAL).partition(".")
        if not key.startswith(SEVERAL) or not rest.startswith(PREFIX):
            return {}
        found.setdefault(name, {})[rest] = tensor
    return found


def held_tensors(root: nn.Module, name: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What a file holds of an adapter in its trained form, under the file's keys: of each layer, and besides.

    The memory is the model's own.
    """
    layers = {path: layer for path, layer in adapter_layers(root).items() if name in layer.settings}
    held = {
        path: {layer.file_key(path, suffix): t for suffix, t in layer.file_tensors(name, False).items()}
        for path, layer in layers.items()
    }
    others = _biases(root, adapter_configs(root)[name], layers)
    for path, unit in units(root).items():
        if isinstance(unit, TrainedCopy) and name in unit.copies:
            others |= {f"{PREFIX}{path}.{key}": t for key, t in unit.copies[name].state_dict().items()}
    return held, others


@torch.no_grad()
def fill_adapter(model: nn.Module, name: str, tensors: dict[str, torch.Tensor], file) -> None:
    """Give an adapter that is there the values of a file in its trained form, and the base what goes with them.

    Where an initialisation has moved a part of the base into the adapter, and the file's is another than the model's,
    the base gets its own part back and gives up the file's. Raises ValueError that names ``file`` and changes nothing
    where the tensors are not those of the adapter, or while one is merged.
    """
    root = unwrap(model)
    if name not in (known := adapter_configs(root)):
        raise ValueError(f"adapter_name: got {name!r}, wanted one of {sorted(known)}")
    held, others = held_tensors(root, name)
    layers = {path: root.get_submodule(path) for path in held}
    for path, layer in layers.items():
        if layer.merged is not None:
            raise ValueError(f"model: got {path!r} with {layer.merged!r} merged, wanted unmerged layers")
    every = {key: tensor for group in (*held.values(), others) for key, tensor in group.items()}
    _compare(file, tensors, {key: tensor.shape for key, tensor in every.items()})
    for path, layer in layers.items():
        layer.release()
        starts = [layer.file_key(path, suffix) for suffix in layer.initial_keys.values()]
        starts = [key for key in starts if key in held[path]]
        moved = any(not torch.equal(tensors[key].to(held[path][key]), held[path][key]) for key in starts)
        if moved:
            layer.restore()
        for key, tensor in held[path].items():
            tensor.copy_(tensors[key])
        if moved:
            layer.commit(name)
    for key, tensor in others.items():
        tensor.copy_(tensors[key])
