"""Adapters over a whole model, in place: attach, detach, merge, unmerge, set_adapter, disabled."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager

import torch
from torch import nn

from spectral_ops.adapters import adopted, quantised
from spectral_ops.adapters.base import AdapterLinear, check_adapter_name
from spectral_ops.adapters.choice import embeddings, parents
from spectral_ops.adapters.choice.targets import Choice, choose, unmatched
from spectral_ops.adapters.methods import layer_class, layer_type, linear_sizes
from spectral_ops.adapters.progress import progressing
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens
from spectral_ops.adapters.tree import (
    Unit,
    adapter_configs,
    adapter_layers,
    holders,
    memory,
    place,
    replace,
    tied,
    units,
    unwrap,
    walk,
)
from spectral_ops.init.svd_cache import SVDFile, stored


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
    root = unwrap(model)
    layer_type(config)
    refuse_peft(root)
    choice = choose(root, config)
    embeddings.warn_tied(root, config)
    embeddings.warn_head(root, choice.layers)
    for field, unused in unmatched(root, choice.config).items():
        warnings.warn(f"{field}: {unused} match nothing in this model", stacklevel=2)
    return attach_adapter(model, choice, adapter_name, autocast_adapter_dtype, progress, file=file)


def refuse_peft(model: nn.Module) -> None:
    """PEFT's layers hold linear layers of their own, base and adapter, which no adapter of ours belongs on."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for path, module in model.named_modules() if tuners is not None else ():
        if isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(
                f"model: got one with PEFT's adapter layers ({path!r}: {type(module).__name__}), wanted one without."
                " spectral_ops.accelerate(model) makes those layers fast; peft_model.unload() takes them out"
            )


def attach_adapter(
    model,
    choice: Choice,
    adapter_name,
    autocast_adapter_dtype=True,
    progress=None,
    initialise=True,
    commit=True,
    file=None,
):
    """:func:`attach` with its SVDFile. A loader fills the tensors itself, without ``initialise`` and ``commit``."""
    root, config, chosen = unwrap(model), choice.config, choice.layers
    method = layer_type(config)
    check_adapter_name(adapter_name)
    known = adapter_configs(root)
    if adapter_name in known:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted a name this model does not have yet")
    if known and config.bias != "none":
        raise ValueError(
            f"bias: got {config.bias!r} beside {sorted(known)}, wanted 'none': biases are the base's, not an adapter's"
        )
    config = config.for_model(linear_sizes(chosen))
    for path, module in chosen.items():
        if isinstance(module, AdapterLinear) and type(module) is not layer_class(config, module):
            raise ValueError(
                f"config: got {type(config).__name__} for {path!r}, a {type(module).__name__},"
                f" wanted {module.config_type.__name__} (or detach first)"
            )
    _not_merged(root, adapter_name)
    switched_off = any(vars(unit).get("switched_off") for unit in units(root).values())
    rows = _trained_rows(root, choice, adapter_name, autocast_adapter_dtype)
    built: dict[str, AdapterLinear] = {}
    holding = holders(root)
    try:
        slow = config.slow_init and initialise
        for path, module in progressing(chosen.items(), type(config).__name__, progress if slow else False):
            layer = built[path] = module if isinstance(module, AdapterLinear) else layer_class(config, module)(module)
            if config.changes_base and layer is not module and any(tied(root, w) for w in layer.weights):
                raise ValueError(f"target_modules: got {path!r}, wanted no tied weight where the base is changed")
            try:
                with stored(file, path):
                    layer.add_adapter(
                        adapter_name, config, path, autocast_adapter_dtype=autocast_adapter_dtype, initialise=initialise
                    )
                held = holding.get(memory(layer.weight), [])
                layer.placed(adapter_name, [other for other, holder in held if holder is not layer.base_layer])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from error
        if file is not None:
            file.save()
    except BaseException:
        for path, layer in built.items():
            if layer is chosen[path]:
                layer.remove_adapter(adapter_name)
        for unit in rows.values():
            unit.remove_adapter(adapter_name)
        raise
    with taken_back(root, adapter_name, committed=False):
        method.link(built, adapter_name)
        replace(root, [(chosen[path], layer) for path, layer in built.items()])
        parents.settle(root)
        _place_copies(root, choice, adapter_name)
        for path, unit in rows.items():
            place(root, path, unit)
        if switched_off:  # adapters are off until somebody switches them on
            switch(root, False)
        root.requires_grad_(False)
        set_adapter(root, adapter_name)
        adopted.adopt(root)
    for layer in built.values() if commit else ():
        layer.commit(adapter_name)
    return model


@contextmanager
def taken_back(root: nn.Module, name: str, committed=True):
    """Take adapter ``name`` out again where the block, which brings it into the model, fails: what is active and what
    trains is then as before. committed: its initialisation has changed the base already."""
    known, active = name in adapter_configs(root), {id(unit): unit.active for unit in units(root).values()}
    trains = {id(p): p.requires_grad for p in root.parameters()}
    try:
        yield
    except BaseException:
        for unit in units(root).values() if not (known or committed) else ():
            unit.remove_adapter(name)
        if not known:
            _remove(root, name)
        for unit in units(root).values():
            unit.active = active.get(id(unit), unit.active)
        for parameter in root.parameters():
            parameter.requires_grad_(trains.get(id(parameter), parameter.requires_grad))
        raise


def _place_copies(root: nn.Module, choice: Choice, name: str) -> None:
    """Put a trained copy wherever a module is to be trained whole; those that are tied get their source's weight."""
    copies = {path: m if isinstance(m, TrainedCopy) else TrainedCopy(m) for path, m in choice.copies.items()}
    for path, unit in copies.items():
        if path not in choice.tied:
            unit.add_adapter(name)
    for path, source in choice.tied.items():
        copies[path].add_adapter(name, copies[source].copies[name])
    for path, unit in copies.items():
        place(root, path, unit)


def _trained_rows(root: nn.Module, choice: Choice, name: str, autocast: bool) -> dict[str, TrainedTokens]:
    """The units that train rows of embeddings, with the new adapter; not in the model yet."""
    units: dict[str, TrainedTokens] = {}
    try:
        for path, indices in choice.tokens.items():
            module = root.get_submodule(path)
            units[path] = module if isinstance(module, TrainedTokens) else TrainedTokens(module)
            units[path].add_adapter(name, indices, autocast_adapter_dtype=autocast)
        for path, source in choice.tied_tokens.items():
            module = root.get_submodule(path)
            units[path] = module if isinstance(module, TrainedTokens) else TrainedTokens(module, tied=units[source])
    except BaseException:
        for unit in units.values():
            unit.remove_adapter(name)
        raise
    return units


def set_adapter(model, name):
    """Make adapter ``name`` the active one, and the only one whose parameters train; layers without it run their base.

    Raises ValueError for an unknown name, or while another adapter is merged. Returns the model.
    """
    root = unwrap(model)
    configs, all_units = adapter_configs(root), units(root)
    if name not in configs:
        raise ValueError(f"name: got {name!r}, wanted one of {sorted(configs)}" if configs else _no_adapters(name))
    _not_merged(root, name)
    for unit in all_units.values():
        unit.set_active(name)
    if any(config.bias == "all" for config in configs.values()):
        for _, module in walk(root):
            if not isinstance(module, Unit) and isinstance(bias := module._parameters.get("bias"), nn.Parameter):
                bias.requires_grad_(configs[name].bias == "all")
    return model


def _not_merged(root: nn.Module, name: str) -> None:
    """Raise ValueError while an adapter other than ``name`` is merged."""
    if blocked := [path for path, unit in units(root).items() if unit.merged not in (None, name)]:
        raise ValueError(f"name: got {name!r} while {blocked[0]!r} has another adapter merged, wanted an unmerged one")


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
    _remove(root, adapter_name)
    return model


def _remove(root: nn.Module, adapter_name: str | None) -> None:
    all_units = units(root)
    bare: list[tuple[nn.Module, nn.Module]] = []
    for unit in all_units.values():
        if adapter_name is not None and [n for n in unit.adapter_names if n != adapter_name]:
            unit.remove_adapter(adapter_name)
        else:
            bare.append((unit, unit.bare()))
    replace(root, bare)
    parents.settle(root)
    if not units(root):
        adopted.release(root)


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
        if any(tied(root, weight) for weight in layer.weights):
            raise ValueError(f"model: got {path!r}, whose weight another module shares, wanted untied weights")
        if safe and not layer.merges_finite():
            raise ValueError(f"{path}: got non-finite merged weights, wanted finite ones (safe=True)")
        if not keep_base:
            try:
                layer.check_undo(layer.active)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    for path, unit in todo.items():
        if safe and isinstance(unit, TrainedTokens) and not torch.isfinite(unit.merge_result()[0]).all():
            raise ValueError(f"{path}: got non-finite merged rows, wanted finite ones (safe=True)")
    for unit in todo.values():
        unit.merge(keep_base=keep_base)
    return model


def unmerge(model):
    """Take the merged adapter out of the base weights again; returns the model. Does nothing where none is merged."""
    for unit in units(model).values():
        unit.unmerge()
    return model


def switch(model: nn.Module, on: bool) -> None:
    """Let every layer use its adapters or not, until the next switch. Off takes a merged adapter out of the weights.

    Unlike :func:`disabled` this does not nest: off twice is off.
    """
    if not on:
        unmerge(model)
    for unit in units(model).values():
        if vars(unit).get("switched_off", False) is on:
            if isinstance(unit, AdapterLinear):
                unit.release()
            unit.switched_off = not on
            unit._disabled += -1 if on else 1


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
            if merged:
                unit.unmerge()
            if isinstance(unit, AdapterLinear):
                unit.release()
            unit._disabled += 1
            entered.append((unit, merged, kept))
        yield model
    finally:
        for unit, merged, kept in entered:
            unit._disabled -= 1
            if merged:
                unit.merge(keep_base=kept)
