"""A state_dict that stands in for a model's own tensors while an adapter is saved, as trainers gather it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spectral_ops.adapters.tree import units


def given(model: nn.Module, root: nn.Module, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state_dict of ``model`` by their names in ``root``'s; ValueError where it lacks trained ones."""
    around = next((path for path, module in model.named_modules() if module is root), "")
    found = {key.removeprefix(f"{around}.") if around else key: tensor for key, tensor in state.items()}
    every = list(root.named_parameters(remove_duplicate=False))
    known = {id(p): found[key] for key, p in every if key in found}
    found |= {key: known[id(p)] for key, p in every if id(p) in known}  # tied ones need be there only once
    own = {
        f"{path}.{key}": p
        for path, unit in units(root).items()
        for key, p in unit.named_parameters()
        if key.split(".")[1:2] == [name]
    }
    missing = [key for key, p in own.items() if id(p) not in known]
    # a frozen one may be left out: it is the model's own
    trained = [key for key in missing if own[key].requires_grad]
    if trained or len(missing) == len(own):
        first, *more = trained or missing
        others = f" and {len(more)} more" if more else ""
        raise ValueError(f"state_dict: got no {first}{others}, wanted the tensors that adapter {name!r} trains")
    return found


@contextmanager
def standing_in(root: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with these tensors, by their names in its state_dict, in place of its own."""
    replaced, modules = [], dict(root.named_modules(remove_duplicate=False)) if tensors else {}
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = modules.get(path)
            if module is None:  # what a quantised weight has beside it
                continue
            holder = module._parameters if leaf in module._parameters else module._buffers
            if leaf not in holder or (holder is module._parameters and not tensor.is_floating_point()):
                continue
            replaced.append((holder, leaf, holder[leaf]))
            holder[leaf] = nn.Parameter(tensor, requires_grad=False) if holder is module._parameters else tensor
        yield
    finally:
        for holder, leaf, own in reversed(replaced):
            holder[leaf] = own
