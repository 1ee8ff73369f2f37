"""What there is in a model: its modules by path, where an adapted one counts as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens

Unit = AdapterLinear | TrainedCopy | TrainedTokens


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's or :func:`as_peft_model`'s wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif getattr(type(model), "holds_adapted_model", False):
            model = model.get_base_model()
        else:
            return model


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module, each under every path it has, without those inside an adapted one."""
    yield path, model
    if isinstance(model, Unit):
        return
    for name, child in model._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def units(model: nn.Module) -> dict[str, Unit]:
    """Adapted layers and trained copies by their (first) path."""
    found: dict[int, tuple[str, Unit]] = {}
    for path, module in walk(unwrap(model)):
        if isinstance(module, Unit):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted linear layers of ``model`` by path."""
    return {path: unit for path, unit in units(model).items() if isinstance(unit, AdapterLinear)}


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter; None where none is."""
    return next((unit.active for unit in units(model).values() if unit.active is not None), None)


def adapter_configs(model: nn.Module) -> dict[str, AdapterConfig]:
    """The config of every adapter of ``model``, as attached."""
    return {name: config for layer in adapter_layers(model).values() for name, config in layer.configs.items()}


def layers_of(model: nn.Module, method: type, adapter_name: str | None, a_kind: str) -> tuple[str, dict[str, Any]]:
    """The name of an adapter (default: the active one), and the layers of ``method`` that have it, by path.

    Raises ValueError where none has it. The message calls such an adapter ``a_kind``.
    """
    layers = {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, method)}
    name = adapter_name or next((layer.active for layer in layers.values() if layer.active), None)
    if found := {path: layer for path, layer in layers.items() if name in layer.settings}:
        return name, found
    known = sorted({n for layer in layers.values() for n in layer.settings})
    raise ValueError(f"adapter_name: got {adapter_name!r}, wanted the name of {a_kind} adapter ({known})")


def replace(model: nn.Module, changes: list[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair wherever the first hangs in the model."""
    new = {id(old): replacement for old, replacement in changes}
    for parent in [module for _, module in walk(model) if not isinstance(module, Unit)]:
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def elsewhere(model: nn.Module, path: str) -> str | None:
    """Another path of the module at ``path``, where another parent holds it too; None where there is none."""
    module = model.get_submodule(path)
    held: dict[tuple[int, str], str] = {}
    for other, parent in walk(model):
        for name, child in parent._modules.items() if not isinstance(parent, Unit) else ():
            if child is module:
                held.setdefault((id(parent), name), f"{other}.{name}" if other else name)
    return next((found for found in held.values() if found != path), None)


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``, and nowhere else."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def tied(model: nn.Module, weight: nn.Parameter) -> bool:
    """Whether more than one module holds this very parameter."""
    return sum(weight is p for module in model.modules() for p in module._parameters.values()) > 1


def memory(weight: torch.Tensor) -> tuple:
    """What two tensors have in common that share memory; the tensor itself where it has no memory of its own."""
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.device.type != "meta"
    return (weight.device, weight.untyped_storage().data_ptr()) if plain else (id(weight),)


def holders(model: nn.Module) -> dict[tuple, list[tuple[str, nn.Module]]]:
    """Which modules hold a parameter or buffer in each piece of memory."""
    found: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.setdefault(memory(tensor), []).append((path, module))
    return found
