"""accelerate, report and restore: the class of each adapter layer swapped, and what became of it told.

The swap changes ``layer.__class__`` (peft.py) and nothing else, so that parameters, hooks and files stay what they are.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any

from peft.tuners import lora, miss
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from spectral_ops.adapters.tree import adapter_layers
from spectral_ops.integrations.peft_adalora import FusedAdaLoraModel
from spectral_ops.integrations.peft_fused import ORIGINALS, REPLACEMENTS
from spectral_ops.integrations.peft_hooks import own, replaced
from spectral_ops.integrations.peft_layers import enter_all
from spectral_ops.integrations.peft_plan import Facts, Unfit, Unsettled, variant_name
from spectral_ops.integrations.peft_report import FUSED, PEFT, UNDECIDED, LayerState, Report, Row
from spectral_ops.integrations.peft_siblings import notes as shared_notes

enter_all()


def accelerate(
    model: nn.Module, *, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
) -> Report:
    """See :func:`spectral_ops.accelerate`."""
    check_module(model)
    layers = tuner_layers(model)
    if not layers:
        raise ValueError(f"model: got a {type(model).__name__} {without_layers(model)}")
    obstacles = obstacles_of(layers)
    rows = survey(model, layers, obstacles, exact)
    left = [f"  {row.name}: {row.reason}" for row in rows if row.path == PEFT]
    if strict and left:
        raise RuntimeError(f"strict=True, and {len(left)} layers would be left to PEFT:\n" + "\n".join(left))
    for name, layer in layers.items():
        if kind(layer) in REPLACEMENTS and obstacles[name] is None:
            layer._spectral_ops = LayerState(name)
            swap(layer, REPLACEMENTS[kind(layer)])
        if kind(layer) in ORIGINALS:
            state = layer._spectral_ops
            state.name, state.strict, state.recompute, state.exact = name, strict, recompute, exact
            state.siblings = siblings
            state.alone()
            state.count_anew()
    for tuner in model.modules():
        if type(tuner) is AdaLoraModel:
            swap(tuner, FusedAdaLoraModel)
            tuner.take_over()
    return report_on(model, layers, rows)


def report(model: nn.Module) -> Report:
    """See :func:`spectral_ops.report`."""
    check_module(model)
    layers = tuner_layers(model)
    states = {name: layer._spectral_ops for name, layer in layers.items() if kind(layer) in ORIGINALS}
    if not states:
        raise ValueError(
            f"model: got a {type(model).__name__} without any accelerated layer, wanted one that"
            " spectral_ops.accelerate has changed"
        )
    obstacles = obstacles_of(layers)
    for name, layer in layers.items():
        if kind(layer) in REPLACEMENTS and obstacles[name] is None:
            obstacles[name] = "added after accelerate: call it again"
        if name in states:
            states[name].name = name
    return report_on(model, layers, survey(model, layers, obstacles, any(s.exact for s in states.values())))


def restore(model: nn.Module) -> nn.Module:
    """See :func:`spectral_ops.restore`."""
    check_module(model)
    for layer in model.modules():
        if kind(layer) in ORIGINALS:
            swap(layer, ORIGINALS[kind(layer)])
            layer._spectral_ops.forget()
            del layer._spectral_ops
        if type(layer) is FusedAdaLoraModel:
            layer.give_back()
            swap(layer, AdaLoraModel)
    return model


def options_of(model: nn.Module) -> dict[str, bool]:
    """See :func:`spectral_ops.integrations.options_of`."""
    state = next((layer._spectral_ops for layer in model.modules() if kind(layer) in ORIGINALS), None)
    names = () if state is None else ("strict", "recompute", "exact", "siblings")
    return {name: getattr(state, name) for name in names}


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {model!r} ({type(model).__name__}), wanted a PEFT model (a torch.nn.Module)")


def without_layers(model: nn.Module) -> str:
    """What a model is that has no adapter layer of PEFT's, and what to do."""
    if adapter_layers(model):
        return (
            "with spectral_ops' own adapter layers (attach), wanted a PEFT model."
            " Those layers are fused already: leave accelerate out"
        )
    configs = getattr(model, "peft_config", None)
    kinds = [getattr(c, "peft_type", None) for c in configs.values()] if isinstance(configs, dict) else []
    if kinds:
        names = ", ".join(dict.fromkeys(str(getattr(kind, "value", kind)) for kind in kinds))
        return (
            f"whose adapter ({names}) has no layers, wanted one with adapter layers such as LoRA's."
            " Prompt and prefix tuning change no layer: use the model as it is"
        )
    return (
        "without any PEFT adapter layer, wanted one that get_peft_model made."
        " Call accelerate on what get_peft_model returns"
    )


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def kind(layer: nn.Module) -> type:
    """The layer's class; where fully_shard has put one of its own before it, the one behind that."""
    cls = type(layer)
    bases = cls.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.") else cls


classes: dict[tuple[type, type], type] = {}  # (what stands before, the class behind it) -> both


def under(cls: type, to: type) -> type:
    """What fully_shard would have made of the class ``to``: ``cls`` is what it has made of another."""
    before, behind = cls.__bases__
    classes.setdefault((before, behind), cls)
    if (before, to) not in classes:
        content = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        classes[before, to] = type(cls.__name__.replace(behind.__name__, to.__name__), (before, to), content)
    return classes[before, to]


def swap(layer: nn.Module, to: type) -> None:
    """Change the layer's class, and with it the old class's methods that somebody has stored bound on the layer."""
    old = kind(layer)
    if type(layer) is old:
        layer.__class__ = to
    else:
        layer.__class__ = under(type(layer), to)
    for key, value in list(layer.__dict__.items()):
        if type(value) is MethodType and value.__self__ is layer:
            name = value.__func__.__name__
            if getattr(old, name, None) is value.__func__:
                layer.__dict__[key] = MethodType(getattr(to, name), layer)


def reaches(layer: nn.Module) -> bool:
    """Whether calling the layer comes to its class's forward: nobody replaced it, or the accelerate library did, whose
    wrapper looks up ``_old_forward`` in every call."""
    return not replaced(layer) or own(layer, layer.__dict__.get("_old_forward"))


def obstacles_of(layers: dict[str, BaseTunerLayer]) -> dict[str, str | None]:
    attention = tuple(f"{name}." for name, m in layers.items() if isinstance(m, MultiheadAttention))
    return {name: obstacle(name, layer, attention) for name, layer in layers.items()}


def obstacle(name: str, layer: BaseTunerLayer, attention: tuple[str, ...]) -> str | None:
    """Why the layer's class is not replaced; ``attention``: prefixes of the names inside a MultiheadAttention layer."""
    original = ORIGINALS.get(kind(layer), kind(layer))
    if name.startswith(attention):
        return "lora.MultiheadAttention uses its weight, not its forward"
    if original not in REPLACEMENTS:
        return f"{original.__name__} layers of the {tuner_of(layer)} tuner are left to PEFT"
    if kind(layer) is original and not reaches(layer):
        return "its own forward was replaced by one that does not lead to its class's"
    return None


def survey(model: nn.Module, layers: dict[str, BaseTunerLayer], obstacles: dict[str, str | None], exact: bool):
    """A row per layer."""
    configs = getattr(model, "peft_config", None) or {}
    return [describe(name, layer, configs, obstacles[name], exact) for name, layer in layers.items()]


def describe(name: str, layer: BaseTunerLayer, configs: dict[str, Any], reason: str | None, exact: bool) -> Row:
    """The row of one layer: decided from its present state, the input still unknown."""
    original = ORIGINALS.get(kind(layer), kind(layer))
    head = (name, f"{tuner_of(layer)}.{original.__name__}", method_of(layer, configs))
    if reason is not None:
        return Row(*head, PEFT, reason=reason)
    try:
        base, adapters = REPLACEMENTS[original]._plan(layer, None, Facts())
    except Unfit as unfit:
        return Row(*head, UNDECIDED if isinstance(unfit, Unsettled) else PEFT, reason=str(unfit))
    if not adapters:
        return Row(*head, FUSED, reason="no active adapter here: the base layer alone")
    fused = REPLACEMENTS[original]
    return Row(*head, *fused._service(base, adapters, exact), reason=fused._remark(base, adapters, exact))


def tuner_of(layer: BaseTunerLayer) -> str:
    """The package of PEFT that the layer's class comes from: "lora", "miss", "adalora"."""
    module = ORIGINALS.get(kind(layer), kind(layer)).__module__
    return module.split(".")[2] if module.startswith("peft.tuners.") else module


def method_of(layer: BaseTunerLayer, configs: dict[str, Any]) -> str:
    """The active methods of a layer in their usual spelling."""
    if isinstance(layer, miss.MissLinear):
        return {"mini": "MiSS mini", "bat": "MiSS bat"}.get(layer.miss_fn, "MiSS")
    fused = REPLACEMENTS.get(ORIGINALS.get(kind(layer), kind(layer)))
    if fused is not None and fused._method:
        return fused._method
    if not isinstance(layer, lora.LoraLayer) or tuner_of(layer) != "lora":
        return tuner_of(layer)
    methods = []
    for name in layer.active_adapters:
        if name not in layer.r:
            continue
        init = getattr(configs.get(name), "init_lora_weights", None)
        if name in layer.lora_variant:
            method = variant_name(layer.lora_variant[name]).replace("Dora", "DoRA")
        elif isinstance(init, str) and init.startswith("pissa"):
            method = "PiSSA"
        else:
            method = "rsLoRA" if layer.use_rslora.get(name) else "LoRA"
        methods.append(method)
    return " + ".join(dict.fromkeys(methods))


def report_on(model: nn.Module, layers: dict[str, BaseTunerLayer], rows: list[Row]) -> Report:
    """The report over layers that have been swapped. It holds their states, not the layers."""
    states = {name: layer._spectral_ops for name, layer in layers.items() if kind(layer) in ORIGINALS}
    for name, state in states.items():
        state.outlive(layers[name])
    adalora = sum(type(tuner) is FusedAdaLoraModel for tuner in model.modules())
    notes = ["AdaLoRA's update_and_allocate and regulariser: fused, one operator for all layers"] * adalora
    reference, known = weakref.ref(model), set(layers)

    def newcomers() -> list[str]:
        alive = reference()
        now = {} if alive is None else tuner_layers(alive)
        return [name for name, layer in now.items() if kind(layer) in REPLACEMENTS and name not in known]

    return Report(rows, states, newcomers, notes, lambda: shared_notes(states.values()))
