"""The experts module of a mixture, run with low-rank updates on its stacked weights by one function.

transformers 5 says in attributes of an experts module what its forward computes (``use_experts_implementation``), so
that another implementation can take its place: here :func:`experts_mlp`. Llama 4's module has no such attributes. It
gets the rows of its experts in order, an equal number each, and is two :func:`experts_lowrank`.

An update is that of the stacked parameter as PEFT packs it: scale B_e A_e is added to the slice [d, k] of expert e, or
its transpose where the module says ``is_transposed``. Llama 4's slices are stored [k, d] and the module does not say
so; A and B then have each other's place in x W.
"""

from __future__ import annotations

import torch
from torch import nn

from spectral_ops.core import checks
from spectral_ops.functional import experts_lowrank, experts_mlp

Update = tuple[torch.Tensor, torch.Tensor, float]

INTERFACE = "transformers.integrations.moe"
ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
LLAMA4 = "Llama4TextExperts.forward"


def follows_interface(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs this module, so that its attributes say what it computes."""
    forward = getattr(type(module).forward, "__globals__", {})
    return forward.get("__name__") == INTERFACE and all(hasattr(module, name) for name in ATTRIBUTES)


def is_llama4(module: nn.Module) -> bool:
    """Whether this is Llama 4's experts module."""
    return getattr(type(module).forward, "__qualname__", "") == LLAMA4


def stacks(module: nn.Module) -> tuple[str, ...]:
    """The names of the two stacked weights of an experts module, the first projection's before the second's; empty for
    any other module."""
    if is_llama4(module):
        return "gate_up_proj", "down_proj"
    if follows_interface(module):
        return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    return ()


def unfit(module: nn.Module, names) -> str | None:
    """Why :func:`run_experts` cannot run ``module`` with updates on the parameters ``names``; None where it can."""
    kind, known = type(module).__name__, stacks(module)
    if not known:
        return f"{kind} follows neither transformers' experts interface nor Llama 4's form"
    if other := [name for name in names if name not in known]:
        return f"{other[0]} is no weight of {kind}'s projections ({' and '.join(known)})"
    for name in known:
        weight = getattr(module, name, None)
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dim() != 3 or weight.dtype not in checks.FLOATS:
            got = checks.describe(weight) if isinstance(weight, torch.Tensor) else type(weight).__name__
            return f"{name} is {got}, not a plain floating-point stack [experts, out, in]"
    return replaced(module)


def replaced(module: nn.Module) -> str | None:
    """Why the module's own call does more than its forward says; None where it does not."""
    if "forward" in module.__dict__:
        return f"the forward of this {type(module).__name__} was replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"this {type(module).__name__} carries hooks"
    if "parametrizations" in module._modules:
        return f"this {type(module).__name__} is parametrized"
    return None


def run_experts(
    module: nn.Module, args: tuple, lora: dict[str, Update], dropout_p: float = 0.0, training: bool = False
) -> torch.Tensor:
    """The module's output for the positional arguments ``args`` of its forward, with updates on its stacks.

    Args:
        module: an experts module that is not :func:`unfit`, its weights frozen.
        lora: by the parameter's name, (A [E, r, in], B [E, out, r], scale), any strides (PEFT's packing as views).
            A parameter that is not named runs as it is.
        dropout_p, training: inverted dropout on the updates' inputs.

    Nothing of the size of a stack is made. Raises TypeError/ValueError as the operators do.
    """
    llama4 = "has_gate" not in module.__dict__  # the only one that fits without
    first, second = "gate_up_proj" if llama4 or module.has_gate else "up_proj", "down_proj"
    up, down = getattr(module, first), getattr(module, second)
    if llama4:
        return _llama4(module, args, up, down, lora.get(first), lora.get(second), dropout_p, training)
    x, index, weights = args
    has_bias = module.has_bias
    return experts_mlp(
        x,
        index,
        weights,
        up,
        down,
        up_lora=lora.get(first),
        down_lora=lora.get(second),
        up_bias=getattr(module, f"{first}_bias") if has_bias else None,
        down_bias=getattr(module, f"{second}_bias") if has_bias else None,
        activation=module._apply_gate if module.has_gate else module.act_fn,
        post_norm=module.post_expert_norm if module.has_post_expert_norm else None,
        transposed=module.is_transposed,
        dropout_p=dropout_p,
        training=training,
    )


def _llama4(module, args, up, down, up_lora, down_lora, dropout_p, training):
    (x,) = args
    x = x.reshape(-1, up.shape[1])
    each = x.shape[0] // up.shape[0]
    ends = torch.arange(1, up.shape[0] + 1, device=x.device, dtype=torch.int32) * each
    options = {"transposed": True, "dropout_p": dropout_p, "training": training}
    gate, value = _transposed(x, up, ends, up_lora, options).chunk(2, -1)
    return _transposed(value * module.act_fn(gate), down, ends, down_lora, options)


def _transposed(x, weight, ends, lora, options):
    A, B, scale = (None, None, 1.0) if lora is None else lora
    A, B = (None, None) if lora is None else (B.mT, A.mT)
    return experts_lowrank(x, weight, ends, A, B, scale=scale, **options)
