"""PEFT's LoRA, MiSS and AdaLoRA layers with the fused operators: what :func:`spectral_ops.accelerate` swaps in.

``accelerate`` changes nothing but ``layer.__class__``, to a subclass of PEFT's own class defined below, so parameters,
state_dict keys, hooks, merging, saving and every isinstance test of PEFT stay as they were. Each call first makes a
plan (peft_plan.py): the tensors to compute with, or the reason why PEFT's own forward must serve it.

Three paths: *fused* reads the base weight and calls no submodule; *fused (base-agnostic)* calls the base layer, as it
must where that is quantised or carries hooks, and adds the adapter to its result; *PEFT* is ``super().forward``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import adalora, lora, miss
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn
from torch.distributed.tensor import DTensor

from spectral_ops.adapters import float8
from spectral_ops.functional import bat, blocksum, column_norm, dora, lowrank
from spectral_ops.integrations import peft_tensor_parallel as tensor_parallel
from spectral_ops.integrations.peft_adalora import SVD, adalora_plan
from spectral_ops.integrations.peft_fused import NARROW, Fused, base_result, enter, operands
from spectral_ops.integrations.peft_miss import Bat, Bone, miss_plan
from spectral_ops.integrations.peft_plan import Base, LowRank, frozen_weight, lora_plan
from spectral_ops.integrations.peft_report import BASE_AGNOSTIC
from spectral_ops.integrations.peft_siblings import Member

# --- the call --------------------------------------------------------------------------------------------------------


def run_lora(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[LowRank]) -> torch.Tensor:
    """Each adapter in turn over what those before it have made, as PEFT adds them: DoRA scales all of that."""
    first, rest = adapters[0], adapters[1:]
    if base.split is not None:
        return run_split(layer, x, base, adapters)
    if base.weight is None:
        out, rest = base_result(base, x), adapters  # first: a fresh 8-bit layer completes its state in its own forward
    elif first.magnitude is None:
        out = lora_linear(x, base, first)
    else:
        out = dora_linear(layer, x, base, first)
    weight = frozen_weight(base) if any(a.magnitude is not None for a in rest) else None
    kept = base.weight is not None and first.magnitude is not None  # by DoRA, for backward
    for a in rest:
        out = out.clone() if kept and out.requires_grad else out
        kept = a.magnitude is not None
        out = dora_over(layer, out, x, base, weight, a) if kept else lora_over(out, x, a)
    return out


def lora_linear(x: torch.Tensor, base: Base, adapter: LowRank) -> torch.Tensor:
    """The base layer's product with one adapter's; lora_B's bias is scaled with its product and joins the base's."""
    total, (B, scale) = base.bias, adapter.scaled()
    if adapter.bias is not None:
        total = adapter.scale * adapter.bias if total is None else total + adapter.scale * adapter.bias
        total = total.to(base.weight.dtype)
    x, weight, total = operands(x, base.weight, total)
    return lowrank.linear(x, weight, adapter.A, B, total, None, None, scale, adapter.p)


def lora_over(out: torch.Tensor, x: torch.Tensor, adapter: LowRank) -> torch.Tensor:
    if adapter.bias is not None:
        out = out + (adapter.scale * adapter.bias).to(out.dtype)
    B, scale = adapter.scaled()
    return lowrank.update(out, x.to(out.dtype), adapter.A, B, None, None, None, scale, adapter.p)


def norm_of(layer: nn.Module, weight: torch.Tensor | None, base: Base, adapter: LowRank) -> torch.Tensor:
    """The column norm. Over a dequantised weight none is kept: telling whether it is stale would need that weight."""
    B, scale = adapter.scaled()
    if weight is None:
        return float8.column_norm(base.layer, adapter.A, B, scale)
    if base.weight is None or torch.compiler.is_compiling():  # a compiled graph computes it anew each time
        with torch.no_grad():
            return column_norm(weight, adapter.A, B, scale)
    return layer._spectral_ops.norm(adapter.name, weight, adapter.A, B, scale)


def dora_linear(layer: nn.Module, x: torch.Tensor, base: Base, adapter: LowRank) -> torch.Tensor:
    norm, (B, scale) = norm_of(layer, base.weight, base, adapter), adapter.scaled()
    x, weight, bias = operands(x, base.weight, base.bias)
    args = adapter.A, B, adapter.magnitude, bias, norm, scale, adapter.p
    return dora.linear(x, weight, *args, layer._spectral_ops.recompute)


def dora_over(layer, out: torch.Tensor, x: torch.Tensor, base: Base, weight: torch.Tensor | None, adapter: LowRank):
    """DoRA over a result. With dropout PEFT scales not that, but the base weight's product with the dropped x."""
    norm, (B, scale) = norm_of(layer, weight, base, adapter), adapter.scaled()
    x, bias, recompute = x.to(out.dtype), base.bias, layer._spectral_ops.recompute
    if adapter.p > 0:
        x, bias = F.dropout(x, adapter.p), None
        product = float8.dropped_product(base.layer, x) if weight is None else F.linear(x, weight.to(x.dtype))
        return out - product + dora.update(product, x, adapter.A, B, adapter.magnitude, bias, norm, scale)
    return dora.update(out, x, adapter.A, B, adapter.magnitude, bias, norm, scale, recompute)


def run_miss(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[Bone] | list[Bat]) -> torch.Tensor:
    if type(adapters[0]) is Bat:
        return run_bat(layer, x, base, adapters[0])
    if base.split is not None:
        return run_split(layer, x, base, adapters)
    if base.weight is None:
        out, rest = base_result(base, x), adapters
    else:
        (D, p), rest = adapters[0], adapters[1:]
        narrow, weight, bias = operands(x, base.weight, base.bias)
        out = blocksum.linear(narrow, weight, D, bias, p)
    for D, p in rest:
        out = blocksum.update(out, x.to(out.dtype), D, p)
    return out if out.dtype is x.dtype else out.to(x.dtype)  # PEFT's MiSS returns x's dtype, also under autocast


def run_split(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[LowRank] | list[Bone]) -> torch.Tensor:
    """Over a tensor-parallel base layer, on this process's shards."""
    out = base.layer(x)
    if isinstance(out, DTensor) or out.shape[:-1] != x.shape[:-1]:  # tokens in parts, too
        out = None
    for a in adapters:
        if out is not None and type(a) is Bone:
            out = tensor_parallel.bone_over(out, x, a.D, base.split, layer.miss_fn == "mini")
        elif out is not None:
            out = tensor_parallel.low_rank_over(out, x, a.A, *a.scaled(), base.split)
    if out is not None:
        return out
    layer._spectral_ops.calls -= 1
    layer._spectral_ops.note("an adapter's sizes are not those of the tensor-parallel base layer's shards")
    return super(Fused, layer).forward(x)


def run_bat(layer: nn.Module, x: torch.Tensor, base: Base, adapter: Bat) -> torch.Tensor:
    bias = base.bias
    if bias is not None and bias.dtype is not base.weight.dtype:  # PEFT's bat takes one in another dtype
        bias = bias.to(base.weight.dtype)
    narrow, weight, bias = operands(x, base.weight, bias)
    if narrow.dtype is not weight.dtype:  # PEFT casts x to the transformed weight's dtype, as wide as its wider part
        dtype = torch.promote_types(narrow.dtype, weight.dtype)
        narrow, weight, bias = (t if t is None else t.to(dtype) for t in (narrow, weight, bias))
    out = bat.linear(narrow, weight, adapter.B, bias, False, layer._spectral_ops.exact)
    return out if out.dtype is x.dtype else out.to(x.dtype)


def run_adalora(layer: nn.Module, x: torch.Tensor, base: Base, adapters: list[SVD]) -> torch.Tensor:
    if base.weight is None:
        out, rest = base_result(base, x), adapters
        if layer.widens:
            out = out.to(torch.promote_types(out.dtype, adapters[0].rank.dtype))
    else:
        first, rest = adapters[0], adapters[1:]
        x, weight, bias = operands(x, base.weight, base.bias)
        out = lowrank.linear(x, weight, first.A, first.B, bias, first.core(), None, first.factor(), first.p)
    for a in rest:
        out = lowrank.update(out, x.to(out.dtype), a.A, a.B, None, a.core(), None, a.factor(), a.p)
    return out


def rounding(base: Base, adapters: list) -> bool:
    """Whether bat's transformed weight would be rounded to a narrow dtype."""
    return isinstance(adapters[0], Bat) and base.weight.dtype in NARROW


class FusedLora(Fused):
    _plan, _run = lora_plan, run_lora

    @classmethod
    def _bind(cls, base, adapters, facts):
        """Usually one operator over one weight."""
        first, weight, bias = adapters[0], base.weight, base.bias
        if weight is None or len(adapters) > 1 or facts.autocast is not None or first.magnitude is not None:
            return super()._bind(base, adapters, facts)
        if first.bias is not None:
            return super()._bind(base, adapters, facts)
        _, A, B, scale, p, *_ = first
        if isinstance(scale, torch.Tensor):
            return lambda layer, x: lowrank.linear(x, weight, A, B * scale, bias, None, None, 1.0, p)
        if p == 0.0 and facts.lasting:
            return Member(weight, A, B, bias, None, scale)
        return lambda layer, x: lowrank.linear(x, weight, A, B, bias, None, None, scale, p)


class FusedLoraLinear(FusedLora, lora.Linear):
    """``peft.tuners.lora.Linear`` through lowrank_linear and dora_linear."""


class FusedTorchaoLoraLinear(FusedLora, TorchaoLoraLinear):
    """``peft.tuners.lora.torchao.TorchaoLoraLinear`` through lowrank_update and dora_update."""


class FusedGPTQLoraLinear(FusedLora, GPTQLoraLinear):
    """``peft.tuners.lora.gptq.GPTQLoraLinear`` through lowrank_update."""


class FusedAwqLoraLinear(FusedLora, AwqLoraLinear):
    """``peft.tuners.lora.awq.AwqLoraLinear`` through lowrank_update."""


class FusedAqlmLoraLinear(FusedLora, AqlmLoraLinear):
    """``peft.tuners.lora.aqlm.AqlmLoraLinear`` through lowrank_update."""


class FusedMissLinear(Fused, miss.MissLinear):
    """``peft.tuners.miss.MissLinear`` through bone_linear and bat_linear."""

    _plan, _run = miss_plan, run_miss

    @classmethod
    def _service(cls, base, adapters, exact):
        if base.split is not None:
            return BASE_AGNOSTIC, "block_sum, lowrank_update"
        path, operators = super()._service(base, adapters, exact)
        return path, f"{operators}, exact" if exact and rounding(base, adapters) else operators

    @classmethod
    def _remark(cls, base, adapters, exact):
        if exact or not rounding(base, adapters):
            return ""
        return f"the transformed weight is rounded to {base.weight.dtype}; accelerate(model, exact=True) does not"

    @classmethod
    def _bind(cls, base, adapters, facts):
        first, weight, bias = adapters[0], base.weight, base.bias
        if weight is None or len(adapters) > 1 or facts.autocast is not None or type(first) is Bat:
            return super()._bind(base, adapters, facts)
        D, p = first
        return lambda layer, x: blocksum.linear(x, weight, D, bias, p)


class FusedAdaLora(Fused):
    _plan, _run, _method = adalora_plan, run_adalora, "AdaLoRA"
    widens = False

    @classmethod
    def _bind(cls, base, adapters, facts):
        first, weight, bias = adapters[0], base.weight, base.bias
        if weight is None or len(adapters) > 1 or facts.autocast is not None:
            return super()._bind(base, adapters, facts)
        A, B, E, rank, scale, p = first
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if rank.requires_grad or capturing or not facts.lasting or isinstance(scale, torch.Tensor):
            return lambda layer, x: lowrank.linear(x, weight, A, B, bias, first.core(), None, first.factor(), p)
        scale = scale / (rank.item() + 1e-5)  # waits for a GPU, once: the number of triplets is a fact of the plan
        if p == 0.0:
            return Member(weight, A, B, bias, E, scale)
        return lambda layer, x: lowrank.linear(x, weight, A, B, bias, E, None, scale, p)


class FusedSVDLinear(FusedAdaLora, adalora.SVDLinear):
    """``peft.tuners.adalora.SVDLinear`` through lowrank_linear with a diagonal core."""


enter(
    FusedLoraLinear,
    FusedTorchaoLoraLinear,
    FusedGPTQLoraLinear,
    FusedAwqLoraLinear,
    FusedAqlmLoraLinear,
    FusedMissLinear,
    FusedSVDLinear,
)

if is_bnb_available():

    class FusedLoraLinear8bitLt(FusedLora, lora.Linear8bitLt):
        """``peft.tuners.lora.Linear8bitLt`` through lowrank_update and dora_update."""

    class FusedSVDLinear8bitLt(FusedAdaLora, adalora.SVDLinear8bitLt):
        """``peft.tuners.adalora.SVDLinear8bitLt`` through lowrank_update with a diagonal core."""

        widens = True  # PEFT divides by the number of triplets in a tensor [1] and adds, out of place, what that widens

    enter(FusedLoraLinear8bitLt, FusedSVDLinear8bitLt)

if is_bnb_4bit_available():

    class FusedLoraLinear4bit(FusedLora, lora.Linear4bit):
        """``peft.tuners.lora.Linear4bit`` through lowrank_update and dora_update."""

    class FusedSVDLinear4bit(FusedAdaLora, adalora.SVDLinear4bit):
        """``peft.tuners.adalora.SVDLinear4bit`` through lowrank_update with a diagonal core."""

    enter(FusedLoraLinear4bit, FusedSVDLinear4bit)
