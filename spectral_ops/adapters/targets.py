"""Which modules of a model a config chooses: to be adapted (target_modules), or trained whole (modules_to_save)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.frozen import is_linear
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.tree import walk


def names_path(entries: Iterable[str], path: str) -> bool:
    """Whether a path is one of ``entries`` or ends with one of them."""
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def _layer_index(config: AdapterConfig, path: str) -> int | None:
    """The index of the layer a path belongs to: the first number in it, or the one after ``layers_pattern``."""
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        return int(match["idx"]) if match else None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path):
            return int(match["idx"])
    return None


def matches(config: AdapterConfig, path: str) -> bool:
    """PEFT's rule whether target_modules (not "all-linear"), exclude_modules and layers_to_transform choose a path."""
    exclude = config.exclude_modules
    if isinstance(exclude, str) and re.fullmatch(exclude, path):
        return False
    if isinstance(exclude, list) and names_path(exclude, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or []):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, path) is not None
    if path in config.target_modules:
        return True
    if not names_path(config.target_modules, path):
        return False
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted
    return not wanted or _layer_index(config, path) in wanted


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, AdapterLinear) or is_linear(module)


def _all_linear(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Every linear layer but the output head (transformers' get_output_embeddings)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = head.original_module if isinstance(head, TrainedCopy) else head
    saved = config.modules_to_save or []
    return [
        path
        for path, module in walk(model)
        if path and _adaptable(module) and module is not head and not names_path(saved, path)
    ]


def targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules ``config`` chooses, by their first path; ValueError where there is none, or one cannot be adapted."""
    linear = {path: module for path, module in walk(model) if path and _adaptable(module)}
    chosen_names = config.target_modules
    if chosen_names is None:
        raise ValueError(f"target_modules: got None, wanted {_wanted(linear)}")
    if isinstance(chosen_names, str) and chosen_names.lower() == "all-linear":
        config = dataclasses.replace(config, target_modules=_all_linear(model, config))
    parents = {path: module for path, module in walk(model)}
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in parents.items():
        if not path or not matches(config, path):
            continue
        if not _adaptable(module):
            raise ValueError(
                f"target_modules: got {chosen_names!r}, which matches {path!r} ({type(module).__name__}),"
                " wanted linear layers only (narrow it, or name that module in exclude_modules)"
            )
        if isinstance(parents.get(path.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"target_modules: got {chosen_names!r}, which matches {path!r}, wanted a layer that is called;"
                " nn.MultiheadAttention reads that weight directly"
            )
        found.setdefault(id(module), (path, module))
    if not found:
        narrowed = "" if config.layers_to_transform is None else f" in layers {config.layers_to_transform}"
        raise ValueError(
            f"target_modules: got {chosen_names!r}, which matches nothing{narrowed}; wanted {_wanted(linear)}"
        )
    return dict(found.values())


def _wanted(linear: dict[str, nn.Module]) -> str:
    if not linear:
        return "a model with linear layers (this one has none)"
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in linear))
    more = ", …" if len(ends) > 12 else ""
    return (
        f'"all-linear", a regular expression, or a list of names such as {ends[:12]}{more}'
        f" ({len(linear)} linear layers, the first is {next(iter(linear))!r})"
    )


def modules_to_save(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` trains whole, by their first path; ValueError where there is none."""
    names, found = config.modules_to_save or [], {}
    for path, module in walk(model):
        if not path or not names_path(names, path):
            continue
        if any(isinstance(m, AdapterLinear) for m in module.modules()):
            raise ValueError(f"modules_to_save: got {names!r}, wanted modules without adapters ({path!r} has some)")
        found.setdefault(id(module), (path, module))
    if names and not found:
        top = [path for path, _ in model.named_children()]
        raise ValueError(
            f"modules_to_save: got {names!r}, which matches nothing, wanted module names such as {top[:8]}"
        )
    return dict(found.values())
