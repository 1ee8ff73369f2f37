"""The adapters of a model as a folder, as PEFT and transformers' Trainer write and look for them."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from spectral_ops._files import safetensors as _safetensors
from spectral_ops._files import write as _write
from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.choice import embeddings
from spectral_ops.adapters.files.tensors import PREFIX, compare, drop_twins, fill_adapter, held_tensors
from spectral_ops.adapters.io import WEIGHTS, save_adapter
from spectral_ops.adapters.tree import adapter_configs, units, unwrap

FILE = "base_model."  # how the keys of an adapter file start
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
    names = list(known) if names is None else [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"selected_adapters: got none, wanted names of {sorted(known)}")
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"selected_adapters: got {missing}, wanted names of {sorted(known)}")
    for name in names:
        save_adapter(model, folder_of(directory, name), name, plain=plain, **options)
    return names


def leave_whole_file(directory: Path, names: list[str]) -> None:
    """Write what Trainer resumes from: for one adapter, that adapter's file under a second name."""
    safetensors = _safetensors()
    if (kept := _foreign(directory)) is not None:
        warnings.warn(
            f"save_directory: got {str(directory)!r}, whose {kept} holds no adapter and stays; Trainer does not"
            " resume from there",
            stacklevel=3,
        )
        return
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


def _foreign(directory: Path) -> str | None:
    """The file by which a folder holds a whole model, the base's for one; None where there is none."""
    if (directory / f"{WHOLE}.index.json").exists():
        return f"{WHOLE}.index.json"
    if not (directory / WHOLE).exists():
        return None
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(directory / WHOLE), framework="pt") as file:
            keys = list(file.keys())
    except (safetensors.SafetensorError, OSError):  # a damaged one is of no use to anyone
        return None
    return None if all(key.startswith((FILE, SEVERAL)) for key in keys) else WHOLE


def in_whole_file(state: dict[str, torch.Tensor], active: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each adapter in what :func:`leave_whole_file` wrote; empty for any other state."""
    if active is not None and state and all(key.startswith(FILE) for key in state):
        return {active: state}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, rest = key.removeprefix(SEVERAL).partition(".")
        if not key.startswith(SEVERAL) or not rest.startswith(FILE):
            return {}
        found.setdefault(name, {})[rest] = tensor
    return found


@torch.no_grad()
def refill(model: nn.Module, name: str, tensors: dict[str, torch.Tensor], file) -> None:
    """:func:`fill_adapter` of an adapter that is there, and of the base embeddings that the file holds.

    Raises ValueError that names ``file`` and changes nothing where the tensors are not those of the adapter, or while
    one is merged.
    """
    root = unwrap(model)
    if name not in (known := adapter_configs(root)):
        raise ValueError(f"adapter_name: got {name!r}, wanted one of {sorted(known)}")
    for path, unit in units(root).items():
        if unit.merged is not None:
            raise ValueError(f"model: got {path!r} with {unit.merged!r} merged, wanted unmerged layers")
    held, others = held_tensors(root, name)
    base = {f"{PREFIX}{path}": tensor for path, tensor in embeddings.standing(root).items()}
    tensors = dict(tensors)
    beside = {path: unit for path, unit in units(root).items() if not isinstance(unit, AdapterLinear)}
    tied = [path for path, unit in beside.items() if getattr(unit, "tied", None) is not None]
    drop_twins(tensors, beside, beside, tied)
    every = {key: tensor for group in (*held.values(), others) for key, tensor in group.items()}
    shapes = {key: tensor.shape for key, tensor in every.items()}
    compare(file, tensors, shapes, {key: tensor.shape for key, tensor in base.items()})
    fill_adapter(root, name, tensors)
    for key, tensor in base.items():
        if key in tensors:
            tensor.copy_(tensors[key])
