"""Argument checks shared by the public functions: they raise before any kernel sees the arguments.

The last line of every message names the argument, what came and what was wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_compiling = torch.compiler.is_compiling


def describe(value: Any) -> str:
    """A tensor's shape, dtype and device, or the value and its type."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{' '.join(repr(value).split())} ({type(value).__name__})"  # in one line, the last of a message


def tensor(name: str, value: Any, shape: str, dim: int | None = None) -> None:
    """A strided floating-point tensor with ``dim`` dimensions; ``shape`` is how the message writes the wanted shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {describe(value)}, wanted a tensor {shape}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}, wanted a strided (dense) tensor {shape}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {describe(value)}, wanted float64, float32, bfloat16 or float16")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name}: got {describe(value)}, wanted {dim} dimensions {shape}")


def size(name: str, value: torch.Tensor, axis: int, wanted: int, why: str) -> None:
    """``value`` has ``wanted`` entries along ``axis``; ``why`` says where that number comes from."""
    if value.shape[axis] != wanted:
        raise ValueError(f"{name}: got {describe(value)}, wanted size {wanted} in dimension {axis} ({why})")


def vector(name: str, value: Any, length: int, why: str) -> None:
    """A floating-point vector of ``length`` entries."""
    tensor(name, value, f"[{length}]", 1)
    size(name, value, 0, length, why)


def device(reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Every other tensor is on the device of the first."""
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and value.device != reference.device:
            raise ValueError(f"{name}: got a tensor on {value.device}, wanted {reference.device} as {reference_name}")


def same_dtype(reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Every other tensor has the dtype of the first."""
    for name, value in others.items():
        if value is not None and value.dtype != reference.dtype:
            raise TypeError(f"{name}: got {value.dtype}, wanted {reference.dtype} as {reference_name}")


def no_narrowing(reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """float64 stays float64: a float64 parameter over a narrower x would lose its digits silently."""
    for name, value in others.items():
        if value is not None and (value.dtype == torch.float64) != (reference.dtype == torch.float64):
            raise TypeError(f"{name}: got {value.dtype}, wanted float64 exactly where x ({reference.dtype}) is float64")


def frozen(**tensors: torch.Tensor | None) -> None:
    """These tensors take no gradient: the fused operators do not compute one for them."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, wanted a frozen tensor (requires_grad_(False))")


def probability(name: str, value: Any) -> None:
    """A dropout probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {describe(value)}, wanted a number in [0, 1)")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: got {value!r}, wanted a number in [0, 1)")


def number(name: str, value: Any) -> None:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {describe(value)}, wanted a number")
    if not _compiling() and not math.isfinite(value):  # a scale that changes is a symbol to the compiler
        raise ValueError(f"{name}: got {value!r}, wanted a finite number")


def integer(name: str, value: Any, low: int, high: int | None, why: str) -> None:
    """An integer in [low, high]."""
    if not _compiling() and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: got {describe(value)}, wanted an integer ({why})")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name}: got {value}, wanted at least {low}{upper} ({why})")


def linear(x: Any, weight: Any, bias: Any) -> None:
    """The arguments every adapted linear layer has: x [..., k], a frozen weight [d, k], an optional bias [d]."""
    tensor("x", x, "[..., in_features]")
    tensor("weight", weight, "[out_features, in_features]", 2)
    if x.dim() < 1:
        raise ValueError(f"x: got {describe(x)}, wanted at least one dimension [..., in_features]")
    size("x", x, -1, weight.shape[1], "in_features of weight")
    if bias is not None:
        vector("bias", bias, weight.shape[0], "out_features of weight")
    device("x", x, weight=weight, bias=bias)
    frozen(weight=weight)


def base(base_out: Any, x: Any) -> None:
    """base_out [..., d], the result of a base layer on x [..., k]."""
    tensor("base_out", base_out, "[..., out_features]")
    tensor("x", x, "[..., in_features]")
    if x.dim() < 1:
        raise ValueError(f"x: got {describe(x)}, wanted at least one dimension [..., in_features]")
    if base_out.dim() < 1 or base_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base_out: got {describe(base_out)}, wanted the leading dimensions of x {list(x.shape[:-1])}")
    device("x", x, base_out=base_out)


def low_rank(x: torch.Tensor, out_features: int, lora_A: Any, lora_B: Any) -> None:
    """lora_A [r, k] and lora_B [d, r] that fit x [..., k] and ``out_features``."""
    tensor("lora_A", lora_A, "[r, in_features]", 2)
    tensor("lora_B", lora_B, "[out_features, r]", 2)
    size("lora_A", lora_A, 1, x.shape[-1], "in_features, the last dimension of x")
    size("lora_B", lora_B, 0, out_features, "out_features")
    if lora_A.shape[0] < 1:
        raise ValueError(f"lora_A: got {describe(lora_A)}, wanted at least one row (the rank)")
    size("lora_B", lora_B, 1, lora_A.shape[0], "the rank, rows of lora_A")
    device("x", x, lora_A=lora_A, lora_B=lora_B)
    no_narrowing(x, lora_A=lora_A, lora_B=lora_B)
