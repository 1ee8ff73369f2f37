"""Weights that somebody else keeps in shards, DeepSpeed's ZeRO-3 and FSDP1, made whole for a call.

Each of them gathers a weight where its own module is called, and the fused path calls no submodule. So the weight is
gathered here in their way, or the call is left to PEFT.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

OFFLOAD = "deepspeed.runtime.zero.parameter_offload"


def fetch(module: nn.Module, p: torch.Tensor) -> str | None:
    """Make a ZeRO-3 parameter whole for this call; why it cannot be, if so."""
    if getattr(module._parameters, "_in_forward", False) and not torch.compiler.is_compiling():
        if p.ds_status.name == "NOT_AVAILABLE":
            p.all_gather()
        elif p.ds_status.name == "INFLIGHT":  # prefetched by the order of calls that DeepSpeed recorded earlier
            for root in sys.modules[OFFLOAD].FWD_MODULE_STACK:
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
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # torch.func's wrappers have no storage; the call is left to PEFT for that reason
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
