"""Modules that compute with a child's weight instead of calling the child, where an adapter would be without effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.choice import reads
from spectral_ops.adapters.tree import walk

# torch's inference fast path hands the weights of linear1 and linear2 to one operator; see settle()
_FAST_PATHS = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
# their kernel for training, on the accelerators that have it, takes the weight of out_proj; PEFT refuses it there too
_MAMBA = frozenset("MambaMixer Mamba2Mixer FalconMambaMixer FalconH1Mixer NemotronHMamba2Mixer".split())
_WITHOUT_SOURCE = {"MultiheadAttention": "out_proj", "LinearCrossEntropyLoss": "linear"}  # of torch, where none is kept


class _Judge:
    """Says of a module and the path from it to a target whether an adapter there must be refused, and why."""

    def __init__(self) -> None:
        self.reader = reads.Reader(_FAST_PATHS)

    def __call__(self, parent: nn.Module, path: str) -> tuple[bool, str] | None:
        kind = type(parent)
        if kind.__name__ in _MAMBA and path == "out_proj":
            return True, f"{kind.__name__} hands the weight of {path} to its training kernel"
        found = self.reader.found(parent)
        if its := found.of(path):
            places = " and ".join(dict.fromkeys(read.function for read in its))
            child = ".".join(its[0].chain)  # with * for any number, so that layers alike are one warning
            never_called = "." not in path and not found.uses(path)  # who calls a deeper one is another's to say
            if never_called or any(read.certain for read in its):
                return True, f"{places} computes with the weight of {child} itself"
            return False, f"{places} computes with the weight of {child} itself on some of its paths"
        if kind.__module__.startswith("torch.nn.") and _WITHOUT_SOURCE.get(kind.__name__) == path:
            return True, f"{kind.__name__}.forward computes with the weight of {path} itself"
        return None


def reads_weight(parent: nn.Module, child_name: str) -> str | None:
    """A sentence that says where ``parent`` computes with the weight of its (dotted) child, or None where it calls it.

    Judged by the source of the parent's methods; where there is none, only torch's own modules are known.
    """
    judged = _Judge()(parent, child_name)
    return None if judged is None else judged[1]


def check(model: nn.Module, chosen: dict[str, nn.Module], explicit: bool) -> dict[str, nn.Module]:
    """Those of the modules ``chosen``, by path, on which an adapter has an effect.

    A module that its parent never calls, or whose weight it computes with in every forward, is an error where the
    config names it (``explicit``), and left out with a warning where "all-linear" does. One whose weight is computed
    with on some paths only stays, with a warning. Raises ValueError, also where nothing stays.
    """
    judge, first = _Judge(), {id(module): path for path, module in chosen.items()}
    modules = dict(walk(model))
    refused: dict[str, str] = {}
    doubtful: dict[str, str] = {}
    for path, module in modules.items():
        for ancestor, rest in _ancestors(path) if id(module) in first else ():
            judged = judge(modules[ancestor], rest)
            if judged is not None and judged[0]:
                refused.setdefault(first[id(module)], judged[1])
            elif judged is not None:
                doubtful[first[id(module)]] = judged[1]
    stay = {path: module for path, module in chosen.items() if path not in refused}
    if refused and (explicit or not stay):
        path, why = next(iter(refused.items()))
        raise ValueError(
            f"target_modules: got {path!r}, wanted layers that are called; {why}, so that an adapter there is without"
            f" effect (name it in exclude_modules)"
        )
    for why, paths in _by_reason(refused).items():
        warnings.warn(f"target_modules: {_listed(paths)} is left out, as {why}", stacklevel=4)
    for why, paths in _by_reason({path: why for path, why in doubtful.items() if path in stay}).items():
        warnings.warn(f"target_modules: {why}, where an adapter on {_listed(paths)} is without effect", stacklevel=4)
    return stay


def _ancestors(path: str) -> Iterator[tuple[str, str]]:
    """(path of an ancestor, path from there), the parent first."""
    names = path.split(".")
    for depth in range(len(names) - 1, -1, -1):
        yield ".".join(names[:depth]), ".".join(names[depth:])


def _by_reason(judged: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for path, why in judged.items():
        reasons.setdefault(why, []).append(path)
    return reasons


def _listed(paths: list[str]) -> str:
    return repr(paths[0]) + (f" and {len(paths) - 1} more like it" if len(paths) > 1 else "")


def settle(model: nn.Module) -> None:
    """Keep torch's encoders off their inference fast path while adapters are in them; let them take it again after.

    In eval mode without gradients nn.TransformerEncoderLayer gives the weights of its linear layers to one operator,
    and nn.TransformerEncoder makes nested tensors for it. Each looks at an attribute first, which is what is changed
    here; the layers then run as they do with gradients. Nested tensors, which only the fast path can take, are a
    ValueError meanwhile. Call this after adapters came into a model or left it.
    """
    for _, module in walk(model):
        if isinstance(module, nn.TransformerEncoderLayer):
            adapted = _adapted(module)
            _switch(module, "activation_relu_or_gelu", 0, adapted)
            hooks = module._forward_pre_hooks
            if adapted and _refuse_nested not in hooks.values():
                module.register_forward_pre_hook(_refuse_nested, with_kwargs=True)
            elif not adapted:
                for key in [key for key, hook in hooks.items() if hook is _refuse_nested]:
                    del hooks[key], module._forward_pre_hooks_with_kwargs[key]
        elif isinstance(module, nn.TransformerEncoder):
            _switch(module, "use_nested_tensor", False, any(map(_adapted, module.layers)))


def _adapted(layer: nn.Module) -> bool:
    return any(isinstance(child, AdapterLinear) for child in layer._modules.values())


def _switch(module: nn.Module, attribute: str, off: int, adapted: bool) -> None:
    if adapted and "_without_adapters" not in module.__dict__:
        module._without_adapters = getattr(module, attribute, off)
        setattr(module, attribute, off)
    elif not adapted and "_without_adapters" in module.__dict__:
        setattr(module, attribute, module.__dict__.pop("_without_adapters"))


def _refuse_nested(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    if any(value.is_nested for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)):
        raise ValueError(f"src: got a nested tensor for a {type(layer).__name__} with adapters, wanted a padded one")
