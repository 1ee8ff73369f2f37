"""Adapters over a whole model, in place: attach, detach, merge, unmerge, set_adapter, disabled."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spectral_ops.adapters import quantised
from spectral_ops.adapters.base import AdapterLinear, check_adapter_name, is_linear, linear_size
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.copies import TrainedCopy
from spectral_ops.adapters.methods import layer_type
from spectral_ops.adapters.progress import progressing
from spectral_ops.init.svd_cache import SVDFile, stored

Unit = AdapterLinear | TrainedCopy


# --- looking around --------------------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or DistributedDataParallel's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
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


def adapter_configs(model: nn.Module) -> dict[str, AdapterConfig]:
    """The config of every adapter of ``model``, as attached."""
    return {name: config for layer in adapter_layers(model).values() for name, config in layer.configs.items()}


def _replace(model: nn.Module, changes: list[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair wherever the first hangs in the model."""
    new = {id(old): replacement for old, replacement in changes}
    for parent in [module for _, module in walk(model) if not isinstance(module, Unit)]:
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def tied(model: nn.Module, weight: nn.Parameter) -> bool:
    """Whether more than one module holds this very parameter."""
    return sum(weight is p for module in model.modules() for p in module._parameters.values()) > 1


def _memory(weight: torch.Tensor) -> tuple:
    """What two tensors have in common that share memory; the tensor itself where it has no memory of its own."""
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.device.type != "meta"
    return (weight.device, weight.untyped_storage().data_ptr()) if plain else (id(weight),)


def _holders(model: nn.Module) -> dict[tuple, list[tuple[str, nn.Module]]]:
    """Which modules hold a parameter or buffer in each piece of memory."""
    found: dict[tuple, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.setdefault(_memory(tensor), []).append((path, module))
    return found


# --- which modules ---------------------------------------------------------------------------------------------------


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


# --- the functions ---------------------------------------------------------------------------------------------------


def attach(model, config, adapter_name="default", *, autocast_adapter_dtype=True, progress=None, svd_cache_dir=None):
    """Put an adapter on every layer that ``config`` chooses, freeze everything else, make the adapter active.

    Args:
        model: any module; changed in place and returned. Unchanged where this raises.
        config: the config of a method, such as LoRAConfig. Its ``target_modules`` decides.
        adapter_name: a model can hold several adapters of one method; :func:`set_adapter` switches.
        autocast_adapter_dtype: float32 adapters over a bf16/fp16 model (as PEFT does); else the model's dtype.
        progress: True or False to show a slow initialisation on stderr; None shows it on a terminal.
        svd_cache_dir: where singular triplets an initialisation needs are read from, and written to where the file is
            not there yet or lacks some, so that the next start of the same job finds them. ValueError where the file
            belongs to other weights.

    Biases and modules_to_save train as the config says. Raises TypeError/ValueError that name the field.
    """
    file = None if svd_cache_dir is None else SVDFile(svd_cache_dir)
    attach_adapter(model, config, adapter_name, autocast_adapter_dtype, progress, file=file)
    paths = [path for path, _ in walk(unwrap(model))]
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field)
        unused = [n for n in names if not any(names_path([n], p) for p in paths)] if isinstance(names, list) else []
        if unused:
            warnings.warn(f"{field}: {unused} match nothing in this model", stacklevel=2)
    return model


def attach_adapter(
    model, config, adapter_name, autocast_adapter_dtype=True, progress=None, initialise=True, commit=True, file=None
):
    """:func:`attach` (with its SVDFile); a loader leaves the initialisation, or its effect on the base, to itself."""
    root, method = unwrap(model), layer_type(config)
    check_adapter_name(adapter_name)
    if adapter_name in adapter_configs(root):
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted a name this model does not have yet")
    chosen, copied = targets(root, config), modules_to_save(root, config)
    config = config.for_model({path: linear_size(module) for path, module in chosen.items()})
    for path, module in chosen.items():
        if isinstance(module, AdapterLinear) and type(module) is not method:
            raise ValueError(
                f"config: got {type(config).__name__} for {path!r}, a {type(module).__name__},"
                f" wanted {module.config_type.__name__} (or detach first)"
            )
        if config.changes_base and not isinstance(module, AdapterLinear) and tied(root, module.weight):
            raise ValueError(f"target_modules: got {path!r}, wanted no tied weight where the base is changed")
    built: dict[str, AdapterLinear] = {}
    holders = _holders(root)
    try:
        slow = config.slow_init and initialise
        for path, module in progressing(chosen.items(), type(config).__name__, progress if slow else False):
            built[path] = module if isinstance(module, AdapterLinear) else method(module)
            try:
                with stored(file, path):
                    built[path].add_adapter(
                        adapter_name, config, path, autocast_adapter_dtype=autocast_adapter_dtype, initialise=initialise
                    )
                base = built[path].base_layer
                others = [other for other, holder in holders.get(_memory(base.weight), []) if holder is not base]
                built[path].placed(adapter_name, others)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from error
        if file is not None:
            file.save()
    except BaseException:
        for path, layer in built.items():
            if layer is chosen[path]:
                layer.remove_adapter(adapter_name)
        raise
    method.link(built, adapter_name)
    copies = {id(m): m if isinstance(m, TrainedCopy) else TrainedCopy(m) for m in copied.values()}
    for copy in copies.values():
        copy.add_adapter(adapter_name)
    _replace(root, [(chosen[path], layer) for path, layer in built.items()])
    _replace(root, [(module, copies[id(module)]) for module in copied.values()])
    for layer in built.values() if commit else ():
        layer.commit(adapter_name)
    root.requires_grad_(False)
    set_adapter(root, adapter_name)
    return model


def modules_to_save(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
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


def set_adapter(model, name):
    """Make adapter ``name`` the active one, and the only one whose parameters train; layers without it run their base.

    Raises ValueError for an unknown name, or while another adapter is merged. Returns the model.
    """
    root = unwrap(model)
    configs, all_units = adapter_configs(root), units(root)
    if name not in configs:
        raise ValueError(f"name: got {name!r}, wanted one of {sorted(configs)}" if configs else _no_adapters(name))
    blocked = [path for path, unit in all_units.items() if unit.merged not in (None, name)]
    if blocked:
        raise ValueError(f"name: got {name!r} while {blocked[0]!r} has another adapter merged, wanted an unmerged one")
    for unit in all_units.values():
        unit.set_active(name)
    if any(config.bias == "all" for config in configs.values()):
        for _, module in walk(root):
            if not isinstance(module, Unit) and isinstance(bias := module._parameters.get("bias"), nn.Parameter):
                bias.requires_grad_(configs[name].bias == "all")
    return model


def _no_adapters(name) -> str:
    return f"name: got {name!r}, wanted the name of an adapter (this model has none: attach one first)"


def detach(model, adapter_name=None):
    """Remove every adapter (or the one named) from ``model`` and give the base layers back; returns the model.

    A merged adapter stays in the weights: ``merge(model); detach(model)`` is a plain fine-tuned model. An unmerged
    PiSSA or MiLoRA layer gets back what its initialisation took, in float32 and cast once. Parameters stay frozen.
    """
    root = unwrap(model)
    known, all_units = adapter_configs(root), units(root)
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(known)}")
    merged = [path for path, unit in all_units.items() if unit.merged is not None]
    if merged and adapter_name is not None:
        raise ValueError(f"adapter_name: got {adapter_name!r} while {merged[0]!r} is merged, wanted unmerged layers")
    bare: list[tuple[nn.Module, nn.Module]] = []
    for unit in all_units.values():
        if adapter_name is not None and [n for n in unit.adapter_names if n != adapter_name]:
            unit.remove_adapter(adapter_name)
        elif isinstance(unit, TrainedCopy):
            bare.append((unit, unit.original_module if unit.merged is None else unit.copies[unit.merged]))
        else:
            if unit.merged is None:
                unit.restore()
            bare.append((unit, unit.base_layer))
    _replace(root, bare)
    return model


def quantize_base(model, format="nf4", *, compute_dtype=None):
    """Quantise the base layers under the adapters of ``model`` in place, by bitsandbytes; returns the model.

    format: "nf4", "fp4" or "int8". compute_dtype: of 4-bit products; default the weight's own dtype. After ``attach``
    of a PiSSA config this is QPiSSA: what is quantised is what the adapter left of the weight (arXiv:2404.02948).
    Layers that are quantised already stay as they are. Raises ValueError while an adapter is merged, and for layers
    other than nn.Linear.
    """
    layers = adapter_layers(model)
    for path, layer in layers.items():
        if layer.merged is not None:
            raise ValueError(f"model: got {path!r} with {layer.merged!r} merged, wanted unmerged layers")
        if layer.is_dense and type(layer.base_layer) is not nn.Linear:
            raise ValueError(f"model: got {path!r}, a {type(layer.base_layer).__name__}, wanted nn.Linear")
    for layer in layers.values():
        layer.release()
        if layer.is_dense:
            layer.base_layer = quantised.quantise(layer.base_layer, format, compute_dtype)
    return model


def merge(model, *, safe=False, keep_base=False):
    """Put the active adapter into the base weights, exact in float32 and cast once; returns the model.

    safe: check every merged weight first; raise ValueError, and change nothing, if one is not finite. keep_base: hold a
    copy of each weight so that :func:`unmerge` is bit-exact. A tied weight is an error. Merging twice does nothing.
    """
    root = unwrap(model)
    todo = {p: u for p, u in units(root).items() if u.merged is None and u.active in u.adapter_names}
    layers = {path: unit for path, unit in todo.items() if isinstance(unit, AdapterLinear)}
    for path, layer in layers.items():
        layer.readable("merge")
        if tied(root, layer.weight):
            raise ValueError(f"model: got {path!r}, whose weight another module shares, wanted untied weights")
        if safe:
            with torch.no_grad():
                if not torch.isfinite(layer.merge_result()[0]).all():
                    raise ValueError(f"{path}: got non-finite merged weights, wanted finite ones (safe=True)")
        if not keep_base:
            try:
                layer.check_undo(layer.active)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    for layer in layers.values():
        layer.merge(keep_base=keep_base)
    for unit in todo.values():
        unit.merged = unit.active
    return model


def unmerge(model):
    """Take the merged adapter out of the base weights again; returns the model. Does nothing where none is merged."""
    for unit in units(model).values():
        if isinstance(unit, AdapterLinear):
            unit.unmerge()
        unit.merged = None
    return model


@contextmanager
def disabled(model):
    """Run the model without its adapters inside the ``with`` block; nestable, and ends properly after an exception.

    A PiSSA or MiLoRA layer computes its original product here. Merged weights are unmerged meanwhile and merged again
    after (bit-exact only with ``merge(keep_base=True)``).
    """
    entered: list[tuple[Unit, bool, bool]] = []
    try:
        for unit in units(model).values():
            merged = unit.merged is not None
            kept = isinstance(unit, AdapterLinear) and unit._snapshot is not None
            if merged and isinstance(unit, AdapterLinear):
                unit.unmerge()
            if isinstance(unit, AdapterLinear):
                unit.release()
            unit._disabled += 1
            entered.append((unit, merged, kept))
        yield model
    finally:
        for unit, merged, kept in entered:
            unit._disabled -= 1
            if merged and isinstance(unit, AdapterLinear):
                unit.merge(keep_base=kept)
