"""Weights that somebody else keeps: DeepSpeed's ZeRO-3, FSDP1, accelerate's device_map.

Each of them puts a hook where a module is called, to make its weights whole or to bring its input to them. The fused
path calls no submodule. So it must know what such a hook would have done, and that reading the weight does the same.
"""

from __future__ import annotations

import functools
import sys
from types import MethodType

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

ZERO3 = ("deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx")  # where ZeRO-3's hooks are from


def inert(module: nn.Module) -> bool:
    """Whether a module's hooks would do nothing in this call that reading its parameters does not."""
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        if any(getattr(hook, "__module__", None) not in ZERO3 for hook in hooks.values()):
            return False
    forward = module.__dict__.get("forward")
    return forward is None or plain(module, forward) or aligned(module, forward)


def plain(module: nn.Module, method) -> bool:
    """Whether a bound method is the forward of the module's class."""
    return type(method) is MethodType and method.__self__ is module and method.__func__ is type(module).forward


def aligned(module: nn.Module, forward) -> bool:
    """Whether a replaced forward is accelerate's, and only brings the input to where the weight is."""
    hook, weight = module.__dict__.get("_hf_hook"), module._parameters.get("weight")
    if weight is None or not isinstance(forward, functools.partial) or forward.func.__module__ != ModelHook.__module__:
        return False
    hooks = hook.hooks if type(hook) is SequentialHook else [hook]
    return plain(module, module.__dict__.get("_old_forward")) and all(stays(h, weight.device) for h in hooks)


def stays(hook: ModelHook, device: torch.device) -> bool:
    """Whether a hook leaves an input on this device as it is, and offloads nothing."""
    if type(hook) is not AlignDevicesHook or hook.offload or hook.no_grad:
        return False
    if hook.execution_device is None:
        return True
    to = torch.device(hook.execution_device)
    return to.type == device.type and to.index in (None, device.index)


def fetch(module: nn.Module, p: torch.Tensor) -> str | None:
    """Make a ZeRO-3 parameter whole for this call; why it cannot be, if so."""
    if getattr(module._parameters, "_in_forward", False) and not torch.compiler.is_compiling():
        if p.ds_status.name == "NOT_AVAILABLE":
            p.all_gather()
        elif p.ds_status.name == "INFLIGHT":  # prefetched by the order of calls that DeepSpeed recorded earlier
            for root in sys.modules[ZERO3[0]].FWD_MODULE_STACK:
                if p in getattr(root, "ds_inflight_param_registry", ()):
                    root.ds_inflight_param_registry.pop(p).wait()
    return None if p.ds_status.name == "AVAILABLE" else "partitioned by ZeRO-3"


def keep(layer: nn.Module, fetched: list[torch.Tensor]) -> None:
    """Have the layer's own hooks gather what its call reads, from now on and before this call's backward.

    All of its parameters at once: DeepSpeed fails where a module reads more than it did in the recorded order of calls,
    as it would once another adapter is active.
    """
    if any(id(p) not in layer._external_params for p in fetched):
        for p in layer.parameters():
            if hasattr(p, "ds_id"):
                sys.modules["deepspeed"].zero.register_external_parameter(layer, p)


def freed(p: torch.Tensor) -> bool:
    """Whether FSDP1 holds the parameter in shards: it gives whole views to its forward, no Parameters."""
    if getattr(p, "_fsdp_flattened", False):
        return p.dim() < 2
    return p.device.type != "meta" and p.untyped_storage().size() == 0 and p.numel() > 0


def frozen(module: nn.Module, name: str, p: torch.Tensor) -> torch.Tensor:
    """FSDP1's view without a gradient, where the parameter that it stands for has none.

    The view inherits the flag of the flat parameter, which holds trained parameters too. FSDP1 throws such a gradient
    away.
    """
    flat = p._base
    params = getattr(flat, "_params", None)
    if params is not None:
        for info, original in zip(flat._param_infos, params, strict=True):
            if info[1] is module and info[0] == name:
                return p if original.requires_grad else p.detach()
    return p


def unit(module: nn.Module) -> nn.Module | None:
    """What FSDP1 wraps in a unit of its own; PEFT's wrap policy does so with each lora_A."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
    return module.module if wrapped else None


def unit_weight(module: nn.Module, inner: nn.Module) -> torch.Tensor | None:
    """A copy of the weight in an FSDP1 unit, made in a call of the unit; None where it holds more than that.

    Only a call gathers it and sends its gradient back to the shards. The copy lasts until the backward, the weight does
    not.
    """
    if torch.compiler.is_compiling() or len(module._handle.flat_param._param_infos) != 1:
        return None
    inner.__dict__["forward"] = lambda: inner.weight.clone()
    try:
        return module()
    finally:
        del inner.__dict__["forward"]
