"""The frozen linear layer under the adapters: which layers can be one, and its weight in whatever format that is in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters import float8, quantised
from spectral_ops.core import checks
from spectral_ops.core.autograd import autocast_arguments
from spectral_ops.functional.float8 import FLOAT8

FP8 = frozenset(FLOAT8)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored transposed, [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def is_linear(module: nn.Module) -> bool:
    """Whether a module can be adapted: nn.Linear, its (quantised) subclasses, and Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_size(module: nn.Module) -> tuple[int, int]:
    """[out_features, in_features] of a linear layer, adapted or not."""
    if is_conv1d(module):
        return tuple(module.weight.shape[::-1])
    return module.out_features, module.in_features


def why_not_dense(base: nn.Module) -> str | None:
    """Why the fused operator must not read this layer's weight itself, or None where it may."""
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"{type(base).__name__} computes its own product"
    parameters = base._parameters
    weight = parameters["weight"] if "weight" in parameters else base.weight
    if type(weight) is not nn.Parameter and quantised.kind(base):
        return f"the weight is a quantised {type(weight).__name__}"
    if weight.dtype in FP8:
        return "the weight is in FP8"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer carries hooks"
    if "forward" in base.__dict__:
        return "the base layer's forward was replaced"
    if weight.requires_grad and torch.is_grad_enabled():
        return "the base weight is being trained"
    return None


class FrozenBase(nn.Module):
    """A module over a linear layer that does not train: ``base_layer``, whose weight it reads, writes and puts back.

    A dense weight is a floating-point matrix. Any other is quantised, and is read through a dequantised copy.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.hold(base_layer)

    def hold(self, base_layer: nn.Module) -> None:
        """Take the layer that does not train; TypeError where it is none of this kind."""
        if not is_linear(base_layer):
            raise TypeError(f"linear: got {type(base_layer).__name__}, wanted nn.Linear or Conv1D")
        if quantised.kind(base_layer) == "float8":
            float8.read(base_layer)  # raises where it cannot be read
        self.base_layer = base_layer
        self.transposed = is_conv1d(base_layer)
        self.out_features, self.in_features = linear_size(base_layer)

    def fused(self, x: torch.Tensor, linear, update, *arguments) -> torch.Tensor:
        """The layer's output, by the one of a method's two forms that fits the base layer.

        ``linear(x, W, bias, *arguments)`` where an operator may read W [d, k]; x, W and bias are cast under autocast.
        ``update(base_layer(x), x, *arguments)`` elsewhere; it may overwrite its first argument.
        """
        base = self._modules["base_layer"]
        if why_not_dense(base) is not None:
            return update(quantised.product(base, x), x, *arguments)
        parameters = base._parameters  # nn.Module's own lookup is slower; FSDP1 and DataParallel move tensors out of it
        weight = parameters["weight"] if "weight" in parameters else base.weight
        bias = parameters["bias"] if "bias" in parameters else base.bias
        if self.transposed:
            weight = weight.t()
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            x, weight, bias = autocast_arguments(x, weight, bias)
        if not isinstance(x, torch.Tensor) or x.dtype is not weight.dtype:
            checks.linear(x, weight, bias)
            checks.same_dtype("x", x, weight=weight, bias=bias)
        return linear(x, weight, bias, *arguments)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What the base layer returns for x, with the whole gradient for it; ValueError where it has none."""
        return quantised.product(self._modules["base_layer"], x)

    def release(self) -> None:
        """Put W back into the base weight, where a method keeps something else there between calls."""

    # as it is stored

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight, as stored."""
        return self.base_layer.weight

    @property
    def weights(self) -> list[torch.Tensor]:
        """The base layer's weights that an adapter changes."""
        return [self.weight]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def matrix(self) -> torch.Tensor:
        """The base weight as [out_features, in_features]; a view."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def is_dense(self) -> bool:
        """Whether the base weight is a plain floating-point matrix."""
        weight = self.base_layer.weight
        whole = weight.is_floating_point() and weight.shape.numel() == self.in_features * self.out_features
        return whole and quantised.kind(self.base_layer) is None

    def _refuse(self, why: str, wanted: str) -> None:
        got = f"{type(self.base_layer).__name__} with a weight {checks.describe(self.base_layer.weight)}"
        raise ValueError(f"base_layer: got {got}, wanted a floating-point weight{wanted} ({why} reads it)")

    def dense_matrix(self, why: str) -> torch.Tensor:
        """:attr:`matrix`, or a ValueError where the base is quantised."""
        if not self.is_dense:
            self._refuse(why, "")
        return self.matrix

    def readable(self, why: str) -> None:
        """Raise ValueError where the weight can neither be read nor dequantised."""
        if not self.is_dense and quantised.kind(self.base_layer) is None:
            self._refuse(why, ", or one of bitsandbytes or torchao, or FP8")

    # in whatever format

    def decomposable(self, why: str) -> torch.Tensor:
        """The base weight [d, k] for a decomposition: as stored, or dequantised."""
        self.readable(why)
        return self.matrix if self.is_dense else quantised.dequantised(self.base_layer)

    def full_matrix(self) -> torch.Tensor:
        """The base weight [d, k] as it is now, in float32 (float64). It may share the weight's memory."""
        weight = self.decomposable("this method")
        return weight.to(accumulate_dtype(weight.dtype))

    def hold_matrix(self) -> Any:
        """The base weight as stored, for :meth:`put_back_matrix`."""
        return self.matrix.clone() if self.is_dense else quantised.held(self.base_layer)

    def put_back_matrix(self, stored: Any) -> None:
        """Make the base weight, bit for bit, what :meth:`hold_matrix` returned."""
        if self.is_dense:
            self.matrix.copy_(stored)
        else:
            quantised.put_back(self.base_layer, stored)

    def write_matrix(self, weight: torch.Tensor) -> None:
        """Make the base weight ``weight`` [d, k], rounded once to the format it is stored in."""
        if self.is_dense:
            self.matrix.copy_(weight)
        else:
            quantised.write(self.base_layer, weight)
