"""Where a layer keeps tensors of its adapters that are no parameters of its own: buffers, and what layers share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class BufferDict(nn.Module):
    """Tensors by name that follow a module to its device and into its state_dict, and do not train."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers


class Tied(nn.Module):
    """One parameter. Layers share this module rather than the parameter: whatever puts another parameter into it
    (``load_state_dict(assign=True)``, ``to_empty``) does so for all of them."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class TiedDict(nn.Module):
    """Parameters by name, as in an nn.ParameterDict; :meth:`tie` makes one that of another layer too."""

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._modules[name].weight

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        self._modules[name] = Tied(parameter)

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, tied.weight) for name, tied in self._modules.items())

    def tie(self, name: str, other: TiedDict) -> None:
        """Share the parameter ``name`` of ``other``."""
        self._modules[name] = other._modules[name]
