"""PEFT's ParamWrapper (``target_parameters``) over the experts of transformers 5: what a call computes with.

PEFT writes W + γBA of the whole stack [E, d, k] in every call, and its gradient. Here the outermost wrapper calls
:func:`run_experts` for itself and the wrappers inside of it, and nothing of that size is made.

Experts are known by transformers' experts interface alone: a class that ``use_experts_implementation`` has decorated
tells by its flags which parameters it has and how they lie, and has its own gate, activation and norm, which are
called. Llama 4's experts, which get their rows sorted and in equal numbers, are known by their class.
"""

from __future__ import annotations

import inspect
import sys
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from spectral_ops.adapters.expert_layer import run_experts
from spectral_ops.integrations.peft_fused import Fused, argument_reason, enter
from spectral_ops.integrations.peft_plan import (
    FLOATS,
    PLAIN,
    Facts,
    Unfit,
    active,
    busy,
    check_input,
    leaf,
    read,
    scaling,
    weight_of,
)
from spectral_ops.integrations.peft_report import FUSED, LayerState, note_trace, note_while_tracing

MOE = "transformers.integrations.moe"
INTEGERS = (torch.int64, torch.int32)


class Factors(NamedTuple):
    """One active adapter of one stack: PEFT's A [rE, in] and B [out, rE], expert slowest in A and fastest in B."""

    stack: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float | torch.Tensor
    swapped: bool  # whether PEFT takes the stack for [E, out, in], which Llama 4's is not

    def stacked(self, experts: int, transposed: bool, dtype: torch.dtype) -> tuple:
        """A [E, r, in] and B [E, out, r] of the product that the experts form, and the scale."""
        A = self.A.unflatten(0, (experts, -1))
        B = self.B.unflatten(1, (-1, experts)).permute(2, 0, 1)
        if self.swapped is transposed:
            A, B = B.mT, A.mT
        A, B = (t if t.dtype in (dtype, torch.float32) else t.to(dtype) for t in (A, B))  # as PEFT casts them
        return (A, B * self.scale, 1.0) if isinstance(self.scale, torch.Tensor) else (A, B, self.scale)


class Experts(NamedTuple):
    """The frozen stacks of an experts module; it stands where other layers have their Base."""

    module: nn.Module
    up: str  # the name of the first stack
    weight: torch.Tensor
    down: torch.Tensor
    biases: list[torch.Tensor | None]
    transposed: bool
    implementation: str | None
    operators: str
    split: None = None

    @property
    def sorted(self) -> bool:
        """Whether rows come sorted by expert and in equal numbers, without routing: Llama 4's."""
        return self.operators == "experts_lowrank"


@torch.compiler.assume_constant_result
def misfit(kind: type, implementation: str | None) -> str:
    """Why a class of experts does not compute what transformers' experts interface says; "" where it does."""
    moe = sys.modules.get(MOE)
    forward = kind.forward
    if moe is None or getattr(forward, "__globals__", None) is not vars(moe):
        return f"the experts are {kind.__name__}, whose forward is not that of transformers' experts interface"
    interface = inspect.getclosurevars(forward).nonlocals.get("experts_interface")
    if interface is not moe.ALL_EXPERTS_FUNCTIONS:
        return f"the experts are {kind.__name__}, with an interface of their own ({type(interface).__name__})"
    if implementation not in (None, "eager"):
        if getattr(interface.get(implementation, None), "__module__", MOE) != MOE:
            return f"experts_implementation={implementation!r} was chosen, whose kernels are its own"
    return ""


def experts_of(module: nn.Module, facts: Facts) -> Experts:
    """The frozen side of the call: its stacks and how they lie."""
    if "parametrizations" in module._modules:
        entries = (p for stack in module.parametrizations.values() for p in stack)
        if any(type(p).__module__ == ParamWrapper.__module__ for p in entries):
            raise Unfit("the wrapper around this one is served by PEFT's own forward")
        raise Unfit("the experts module is parametrized")
    kind, flags = type(module), module.__dict__
    llama4 = getattr(sys.modules.get("transformers.models.llama4.modeling_llama4"), "Llama4TextExperts", None)
    implementation, up, transposed, biased = None, "gate_up_proj", True, False
    if kind is not llama4:
        config = facts.entry(flags, "config")
        implementation = getattr(config, "_experts_implementation", None)
        if reason := misfit(kind, implementation):
            raise Unfit(reason)
        up = "gate_up_proj" if facts.entry(flags, "has_gate") else "up_proj"
        transposed, biased = facts.entry(flags, "is_transposed"), facts.entry(flags, "has_bias")
        facts.entry(flags, "has_post_expert_norm")
    if busy(facts.module(module), facts):
        raise Unfit("the experts module carries hooks of its own")
    weight, down = stacks = [weight_of(module, facts, name) for name in (up, "down_proj")]
    biases = [read(module, f"{n}_bias", f"the base {n}_bias", facts) if biased else None for n in (up, "down_proj")]
    for name, stack, bias in zip((up, "down_proj"), stacks, biases, strict=True):
        if stack.dim() != 3 or stack.shape[0] < 2:
            raise Unfit(f"{name} {list(stack.shape)} is not a stack of experts")
        if stack.dtype not in FLOATS or stack.dtype is not weight.dtype:
            raise Unfit(f"{name} is in {stack.dtype}, not a dtype that the experts' operators take")
        if bias is not None and bias.dtype is not weight.dtype:
            raise Unfit(f"{name}_bias is in {bias.dtype}, its stack in {weight.dtype}")
    operators = "experts_lowrank" if kind is llama4 else "experts_mlp"
    return Experts(module, up, weight, down, biases, bool(transposed), implementation, operators)


def factors_of(wrapper: nn.Module, layer: nn.Module, facts: Facts) -> list[Factors]:
    """The active adapters of one wrapper; ``layer`` is the outermost."""
    if wrapper._disable_adapters or wrapper.merged_adapters:
        if wrapper._disable_adapters and wrapper.merged_adapters:
            raise Unfit("an adapter inside is merged and switched off: PEFT takes it out of the weight")
        return []
    As, Bs = (facts.entry(wrapper._modules, key)._modules for key in ("lora_A", "lora_B"))
    scales = facts.attribute(layer, "scaling") if wrapper is layer else facts.entry(wrapper.__dict__, "scaling")
    factors = []
    for name in active(wrapper):
        if (module_A := facts.entry(As, name)) is None:
            continue
        A = leaf(module_A, nn.Linear, "lora_A", facts)
        B = leaf(facts.entry(Bs, name), nn.Linear, "lora_B", facts)
        swapped = getattr(wrapper, "_did_swap_in_out_features", False)  # before PEFT 0.19 there was none
        factors.append(Factors(wrapper.parameter_name, A, B, scaling(facts.entry(scales, name)), swapped))
    return factors


def nested(layer: nn.Module, facts: Facts) -> tuple[list[nn.Module], nn.Module]:
    """The wrappers, the outermost first, and the module whose parameters they adapt."""
    wrappers, module = [layer], facts.entry(layer._modules, "base_layer")
    while isinstance(module, ParamWrapper):
        if busy(facts.module(module), facts):
            raise Unfit("a wrapper inside this one carries hooks of its own")
        wrappers.append(module)
        module = facts.entry(module._modules, "base_layer")
    return wrappers, module


def experts_plan(layer: nn.Module, x: torch.Tensor | None, facts: Facts) -> tuple[Experts, list[Factors]]:
    """The tensors of a ParamWrapper's call, or Unfit: the stacks, and the adapters of it and of the wrappers inside."""
    facts.called = x is not None
    wrappers, module = nested(layer, facts)
    names = [wrapper.parameter_name for wrapper in wrappers]
    for name in names if "parametrizations" not in module._modules else ():
        stack = facts.parameter(module, name)
        if stack is not None and len(getattr(stack, "ds_shape", stack.shape)) != 3:
            raise Unfit(f"{name} of {type(module).__name__} is a matrix, not a stack of experts")
    experts = experts_of(module, facts)
    if odd := [name for name in names if name not in (experts.up, "down_proj")]:
        raise Unfit(f"{odd[0]} is neither {experts.up} nor down_proj")
    own, *inner = [factors_of(wrapper, layer, facts) for wrapper in wrappers]
    if not own:  # the wrapper inside of this one does it all
        return experts, []
    factors = own + [f for some in inner for f in some]
    if x is not None:
        if x.dim() != 2:
            raise Unfit(f"x has {x.dim()} dimensions, not two")
        others = [experts.down, *(t for f in factors for t in (f.A, f.B))]
        others += [bias for bias in experts.biases if bias is not None]
        check_input(layer, x, experts, others, facts, any_weight=not experts.sorted)
    return experts, factors


# --- the call --------------------------------------------------------------------------------------------------------


def lora_of(factors: list[Factors], stack: str, weight: torch.Tensor, transposed: bool) -> tuple | None:
    """(A, B, scale) of one stack. Several adapters side by side along the rank, with their scales in B."""
    each = [f.stacked(weight.shape[0], transposed, weight.dtype) for f in factors if f.stack == stack]
    if len(each) < 2:
        return each[0] if each else None
    return torch.cat([A for A, _, _ in each], 1), torch.cat([B * scale for _, B, scale in each], 2), 1.0


class Call(NamedTuple):
    """What a plan computes, and the facts that :class:`Facts` has no place for. It must not hold the outermost wrapper,
    which holds it."""

    experts: Experts
    factors: list[Factors]
    inside: list[tuple[nn.Module, list]]  # the wrappers inside, and how their adapters are switched
    states: list[tuple[LayerState, bool]]  # what they remember, and whether they have a part in it

    def fits(self, x: torch.Tensor, args: tuple) -> str:
        """Why these arguments do not go with it; "" where they do."""
        if self.experts.sorted:
            E = self.experts.weight.shape[0]
            if args:
                return "extra arguments to forward"
            return "" if x.shape[0] % E == 0 else f"{x.shape[0]} rows are not as many for each of {E} experts"
        if len(args) != 2:
            return f"{len(args)} arguments to forward beside x, not top_k_index and top_k_weights"
        for t in args:
            if type(t) not in PLAIN or t.dim() != 2:
                return "top_k_index or top_k_weights is not a plain tensor [tokens, k]"
        index, weights = args
        if index.dtype not in INTEGERS or weights.dtype not in FLOATS:
            return f"top_k_index is in {index.dtype} and top_k_weights in {weights.dtype}"
        return ""

    def holds(self) -> bool:
        """Whether the call is what planning anew would give, beside what its Facts say."""
        experts = self.experts
        if torch.is_grad_enabled() and (experts.weight.requires_grad or experts.down.requires_grad):
            return False
        if not experts.sorted and experts.module.config._experts_implementation != experts.implementation:
            return False
        return all(switched(wrapper) == setting for wrapper, setting in self.inside)

    def count(self, state: LayerState) -> None:
        """A call of the outermost wrapper, whose state this is, is one of each inside of it."""
        state.calls += 1
        for inner, taken in self.states:
            if taken:
                inner.calls += 1
                inner.served = state.served
            else:
                inner.idle += 1

    def __call__(self, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """The views of PEFT's factors are made here, for the graph of this call."""
        experts = self.experts
        stacks = (experts.up, experts.weight), ("down_proj", experts.down)
        loras = {name: lora_of(self.factors, name, weight, experts.transposed) for name, weight in stacks}
        names = f"{experts.up}_bias", "down_proj_bias"
        biases = {name: bias for name, bias in zip(names, experts.biases, strict=True) if bias is not None}
        return run_experts(experts.module, (x, *routing), loras, held={**dict(stacks), **biases})


def switched(wrapper: nn.Module) -> list:
    """Which adapters of a wrapper are active, and whether they are off or merged."""
    names = wrapper._active_adapter
    return [list(names) if isinstance(names, list) else names, wrapper._disable_adapters, list(wrapper.merged_adapters)]


def call_of(experts: Experts, factors: list[Factors], inner: list[nn.Module]) -> Call:
    settings = [(wrapper, switched(wrapper)) for wrapper in inner]
    stacks = {f.stack for f in factors}
    states = [(w._spectral_ops, w.parameter_name in stacks) for w in inner if "_spectral_ops" in w.__dict__]
    return Call(experts, factors, settings, states)


class FusedParamWrapper(Fused, ParamWrapper):
    """``peft.tuners.lora.layer.ParamWrapper`` through experts_mlp, Llama 4's through experts_lowrank.

    The outermost wrapper computes for those inside of it, and counts for them. Where PEFT's forward serves it, it
    serves them too.
    """

    _plan = experts_plan

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            state = self.__dict__.get("_spectral_ops")
            if state is None:  # restored while somebody held this method bound
                return type(self).forward(self, x, *args, **kwargs)
            plan = state.plan
            if plan is not None and not kwargs and plan[0].hold(self, x):
                call = plan[1]
                if call.holds() and not call.fits(x, args):
                    call.count(state)
                    return call(x, *args)
        elif "_spectral_ops" not in self.__dict__:
            return type(self).forward(self, x, *args, **kwargs)
        return self._planned(x, *args, **kwargs)

    def _planned(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        state, compiling = self._spectral_ops, torch.compiler.is_compiling()
        reason, facts, factors = "", Facts(), []
        if kwargs.keys() <= {"top_k_index", "top_k_weights"} and len(args) + len(kwargs) == 2:
            args, kwargs = (*args, *(kwargs[n] for n in ("top_k_index", "top_k_weights") if n in kwargs)), {}
        if not self._disable_adapters and not self.merged_adapters:
            try:
                if kwargs:
                    raise Unfit(argument_reason(kwargs))
                experts, factors = self._plan(x, facts)
            except Unfit as unfit:
                reason = str(unfit)
        if factors:
            call = call_of(experts, factors, nested(self, facts)[0][1:])
            reason = call.fits(x, args)
            if not reason:
                if compiling:
                    note_trace()
                else:
                    state.plan = (facts, call) if facts.lasting else None
                    state.served = FUSED, experts.operators
                    call.count(state)
                return call(x, *args)
        if reason:
            note_while_tracing(state.key, reason) if compiling else state.note(reason)
        elif not compiling:
            state.idle += 1
        return super(Fused, self).forward(x, *args, **kwargs)


FusedParamWrapper.__name__ = ParamWrapper.__name__  # by which PEFT knows a wrapper that may take another adapter
enter(FusedParamWrapper)
