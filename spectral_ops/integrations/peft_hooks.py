"""What a hook is: whether calling a module does more than its class's forward, and whether that matters in this call.

The fused path calls no submodule that it can do without. A hook must not be bypassed; one that would do nothing may be.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

ZERO3 = ("deepspeed.runtime.zero.parameter_offload", "deepspeed.utils.nvtx")  # where ZeRO-3's hooks are from


def own(module: nn.Module, method: Any) -> bool:
    """Whether a value is nothing but the forward of the module's class, bound: the accelerate library leaves one."""
    return type(method) is MethodType and method.__self__ is module and method.__func__ is type(module).forward


def replaced(module: nn.Module) -> bool:
    """Whether somebody put another forward on the instance (device_map offload does)."""
    return "forward" in module.__dict__ and not own(module, module.__dict__["forward"])


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a replaced one."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (replaced(module) and not keeps_device(module))
    )


def keeps_device(module: nn.Module) -> bool:
    """Whether the forward on the instance is ms-swift's, which moves x to the weight's device and calls the class's."""
    wrapper = module.__dict__["forward"]
    return (
        "weight" in module._parameters
        and type(wrapper) is MethodType
        and wrapper.__self__ is module
        and (wrapper.__func__.__module__, wrapper.__func__.__name__) == ("swift.tuners.peft", "keep_device_forward")
        and own(module, module.__dict__.get("forward_origin"))
    )


def inert(module: nn.Module) -> bool:
    """Whether a module's hooks would do nothing in this call that reading its parameters does not."""
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        if any(getattr(hook, "__module__", None) not in ZERO3 for hook in hooks.values()):
            return False
    forward = module.__dict__.get("forward")
    return forward is None or own(module, forward) or aligned(module, forward)


def aligned(module: nn.Module, forward) -> bool:
    """Whether a replaced forward is accelerate's, and only brings the input to where the weight is."""
    hook, weight = module.__dict__.get("_hf_hook"), next(module.parameters(), None)
    if weight is None or not isinstance(forward, functools.partial) or forward.func.__module__ != ModelHook.__module__:
        return False
    hooks = hook.hooks if type(hook) is SequentialHook else [hook]
    return own(module, module.__dict__.get("_old_forward")) and all(stays(h, weight.device) for h in hooks)


def stays(hook: ModelHook, device: torch.device) -> bool:
    """Whether a hook leaves an input on this device as it is, and offloads nothing."""
    if type(hook) is not AlignDevicesHook or hook.offload or hook.no_grad:
        return False
    if hook.execution_device is None:
        return True
    to = torch.device(hook.execution_device)
    return to.type == device.type and to.index in (None, device.index)
