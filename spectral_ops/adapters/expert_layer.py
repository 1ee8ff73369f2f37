"""The experts module of a mixture, run with low-rank updates on its stacked weights by one function.

transformers 5 says in attributes of an experts module what its forward computes (``use_experts_implementation``), so
that another implementation can take its place: here :func:`experts_mlp`. Llama 4's module has no such attributes. It
gets the rows of its experts in order, an equal number each, and is two :func:`experts_lowrank`.

An update belongs to the product x W_eᵀ, whichever way the slice of expert e is stored. PEFT packs that of the slice as
it is stored, [d, k], or transposed where the module says ``is_transposed``. Llama 4's slices are stored [k, d] and the
module does not say so: of what is packed, A and B then have each other's place (:func:`of_product`).
"""

from __future__ import annotations

import torch
from torch import nn

from spectral_ops.core import checks
from spectral_ops.functional import experts_lowrank, experts_mlp

Update = tuple[torch.Tensor, torch.Tensor, float]

INTERFACE = "transformers.integrations.moe"
ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
LLAMA4 = "transformers.models.llama4.modeling_llama4", "Llama4TextExperts.forward"


def follows_interface(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs this module, so that its attributes say what it computes."""
    forward = getattr(type(module).forward, "__globals__", {})
    return forward.get("__name__") == INTERFACE and all(hasattr(module, name) for name in ATTRIBUTES)


def is_llama4(module: nn.Module) -> bool:
    """Whether this is Llama 4's experts module."""
    forward = type(module).forward
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) == LLAMA4


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
    biases = [f"{name}_bias" for name in known] if getattr(module, "has_bias", False) else []
    dtypes = {name: getattr(module, name).dtype for name in (*known, *biases)}
    if other := [name for name, dtype in dtypes.items() if dtype is not dtypes[known[0]]]:
        return f"{other[0]} is in {dtypes[other[0]]}, {known[0]} in {dtypes[known[0]]}"
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


def of_product(module: nn.Module, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, r, in] and B [E, out, r] of the product x W_eᵀ, from those that PEFT packs for the module."""
    return (B.mT, A.mT) if is_llama4(module) else (A, B)


def run_experts(
    module: nn.Module,
    args: tuple,
    lora: dict[str, Update],
    dropout_p: float = 0.0,
    training: bool = False,
    held: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The module's output for the positional arguments ``args`` of its forward, with updates on its stacks.

    Args:
        module: an experts module that is not :func:`unfit`, its weights frozen.
        lora: by the parameter's name, (A [E, r, in], B [E, out, r], scale) of its product, any strides. A parameter
            that is not named runs as it is.
        dropout_p, training: inverted dropout on the updates' inputs.
        held: stacks and biases, by name, to be read in place of the module's own (views of FSDP1's, which take no
            gradient).

    Nothing of the size of a stack is made. Raises TypeError/ValueError as the operators do.
    """
    llama4 = "has_gate" not in module.__dict__  # the only one that fits without
    first, second = "gate_up_proj" if llama4 or module.has_gate else "up_proj", "down_proj"
    held = held or {}

    def own(name):
        return held[name] if name in held else getattr(module, name)

    up, down = own(first), own(second)
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
        up_bias=own(f"{first}_bias") if has_bias else None,
        down_bias=own(f"{second}_bias") if has_bias else None,
        activation=module._apply_gate if module.has_gate else module.act_fn,
        post_norm=module.post_expert_norm if module.has_post_expert_norm else None,
        transposed=module.is_transposed,
        dropout_p=dropout_p,
        training=training,
    )


def _llama4(module, args, up, down, up_lora, down_lora, dropout_p, training):
    (x,) = args
    x = x.reshape(-1, up.shape[1])
    each, rest = divmod(x.shape[0], up.shape[0])
    if rest:
        raise ValueError(f"x: got {checks.describe(x)}, wanted as many rows for each of {up.shape[0]} experts")
    ends = torch.arange(1, up.shape[0] + 1, device=x.device, dtype=torch.int32) * each
    options = {"transposed": True, "dropout_p": dropout_p, "training": training}

    def linear(rows, weight, lora):
        A, B, scale = lora or (None, None, 1.0)
        return experts_lowrank(rows, weight, ends, A, B, scale=scale, **options)

    gate, value = linear(x, up, up_lora).chunk(2, -1)
    return linear(value * module.act_fn(gate), down, down_lora)
