"""What a file holds of an adapter: its tensors by their keys there, into the file and out of it."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import torch
from torch import nn

from spectral_ops.adapters.base import AdapterLinear
from spectral_ops.adapters.choice import embeddings
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens
from spectral_ops.adapters.tree import Unit, adapter_configs, adapter_layers, elsewhere, units, unwrap, walk

PREFIX = "base_model.model."
SAMPLES = 16  # values of a base weight, by which a file tells it from another
PARTLY = "the layer {!r} is also {!r}, and PEFT adapts only the first of these"


# --- out of a model --------------------------------------------------------------------------------------------------


def adapter_tensors(model, name: str, *, plain=True, save_embedding_layers="auto") -> dict[str, torch.Tensor]:
    """What a file holds of adapter ``name``, by its keys there: copies on the CPU."""
    root = unwrap(model)
    layers, others = held_tensors(root, name, plain)
    base = embeddings.travelling(root, adapter_configs(root)[name], save_embedding_layers)
    others |= {f"{PREFIX}{path}": tensor for path, tensor in base.items()}
    tensors = {key: tensor for group in (*layers.values(), others) for key, tensor in group.items()}
    return {key: whole(tensor.detach()).cpu().clone().contiguous() for key, tensor in tensors.items()}


def held_tensors(
    root: nn.Module, name: str, plain=False
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What a file holds of an adapter, under the file's keys: of each layer, and what else trains with it.

    In the trained form, which is not ``plain``, the memory is the model's own.
    """
    held = {
        path: {layer.file_key(path, suffix): t for suffix, t in layer.file_tensors(name, plain).items()}
        for path, layer in with_adapter(root, name).items()
    }
    return held, beside(root, name)


def with_adapter(root: nn.Module, name: str) -> dict[str, AdapterLinear]:
    """The layers that have adapter ``name``, by path."""
    return {path: layer for path, layer in adapter_layers(root).items() if name in layer.settings}


def beside(root: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What trains with the layers of adapter ``name``, by its keys in the file: biases, copies, rows."""
    found = biases(root, adapter_configs(root)[name], with_adapter(root, name))
    for path, unit in units(root).items():
        if isinstance(unit, TrainedCopy) and name in unit.copies:
            found |= {f"{PREFIX}{path}.{key}": t for key, t in unit.copies[name].state_dict().items()}
        if isinstance(unit, TrainedTokens):
            found |= {f"{PREFIX}{path}.{key}": t for key, t in unit.file_tensors(name).items()}
    return found


def biases(root: nn.Module, config: AdapterConfig, chosen) -> dict[str, torch.Tensor]:
    """The base biases that train under ``config``, by their key in PEFT's file; ``chosen`` are the adapted paths."""
    found, beside = {}, (TrainedCopy, TrainedTokens)
    for path, module in walk(root) if config.bias != "none" else ():
        base = module.base_layer if isinstance(module, AdapterLinear) else module
        bias = base._parameters.get("bias")
        if bias is not None and (path in chosen or config.bias == "all") and not isinstance(module, beside):
            found[f"{PREFIX}{path}{'.base_layer' if path in chosen else ''}.bias"] = bias
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, which every process must take part in; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def refuse_shards(layers: dict[str, AdapterLinear]) -> None:
    """Raise ValueError where DeepSpeed's ZeRO-3 has partitioned a tensor of an adapter, so that it is not here."""
    for path, layer in layers.items():
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer.") and hasattr(parameter, "ds_shape") and not parameter.numel():
                raise ValueError(
                    f"model: got {path}.{key} partitioned, wanted it whole: save inside"
                    " deepspeed.zero.GatheredParameters, or pass the gathered tensors as state_dict"
                )


def shared(root: nn.Module, layers) -> tuple[str, str] | None:
    """The two paths of an adapted layer that hangs under two parents; None where there is none."""
    count: dict[int, int] = {}
    for _, parent in walk(root):
        for child in map(id, parent._modules.values()) if not isinstance(parent, Unit) else ():
            count[child] = count.get(child, 0) + 1
    suspects = [path for path in layers if count.get(id(root.get_submodule(path)), 0) > 1]
    return next(((path, other) for path in suspects if (other := elsewhere(root, path))), None)


# --- into a model ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_adapter(model, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give adapter ``name`` of ``model`` the tensors of a file, by their keys there, in the form that is trained.

    Where an initialisation moved a part of the base into the adapter, and the file's is another than the model's, the
    base gets its own part back and gives up the file's.
    """
    root = unwrap(model)
    for path, layer in with_adapter(root, name).items():
        layer.release()
        own = {layer.file_key(path, suffix): getattr(layer, key)[name] for key, suffix in layer.saved(name).items()}
        starts = {layer.file_key(path, suffix): getattr(layer, key) for key, suffix in layer.starts(name).items()}
        given = bool(starts) and all(key in tensors for key in starts)
        known = given and all(name in held for held in starts.values())
        moved = known and any(not torch.equal(tensors[key].to(held[name]), held[name]) for key, held in starts.items())
        if moved:
            layer.restore()
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        if given and (moved or not known):
            layer.set_initial(name, *(tensors[key] for key in starts))
            layer.commit(name)
    for key, tensor in beside(root, name).items():
        if key in tensors:  # else a bias that stays the model's: see _check
            tensor.copy_(tensors[key])


def drop_twins(tensors: dict[str, torch.Tensor], copies, tokens, tied_tokens) -> None:
    """Forget what PEFT wrote a second time: whole wrappers with an embedding or a bias, and what is tied."""
    twins = [f"{PREFIX}{path}.modules_to_save." for path in copies]
    twins += [f"{PREFIX}{path}.token_adapter.trainable_tokens_original" for path in tokens]
    twins += [f"{PREFIX}{path}.token_adapter.trainable_tokens_" for path in tied_tokens]
    for key in [key for key in tensors if key.startswith(tuple(twins))] if twins else ():
        del tensors[key]


def compare(
    path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size], allowed: dict[str, torch.Size]
) -> None:
    """Raise ValueError where the tensors of the file at ``path`` are not all that is expected, or more than allowed."""
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected and key not in allowed]
    shapes = {
        key: f"{list(tensors[key].shape)}, wanted {list(shape)}"
        for key, shape in {**allowed, **expected}.items()
        if key in tensors and tensors[key].shape != shape
    }
    if missing:
        raise ValueError(f"{path}: got no {_some(missing)}, wanted every tensor of the adapter on this model")
    if extra:
        raise ValueError(f"{path}: got {_some(extra)}, wanted no tensor that the adapter on this model lacks")
    resized = [key for key in shapes if key in allowed and tensors[key].dim() == len(allowed[key]) == 2]
    if resized:
        rows = tensors[resized[0]].shape[0]
        hint = f"resize_token_embeddings({rows}) gives the model as many rows as the adapter was trained with"
        raise ValueError(f"{path}: got {_some({k: shapes[k] for k in resized})} ({hint})")
    if shapes:
        raise ValueError(f"{path}: got {_some(shapes)} (rank and this model's layers)")


def _some(items) -> str:
    shown = [f"{key} {value}" for key, value in items.items()] if isinstance(items, dict) else list(items)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


# --- which base -------------------------------------------------------------------------------------------------------


def sample(layer: AdapterLinear) -> str | None:
    """Evenly spaced values of the original base weight; None for a weight that is not dense, or sharded, which only all
    processes together could read."""
    if any(hasattr(weight, "full_tensor") for weight in layer.weights):
        return None
    try:
        layer.dense_matrix("the fingerprint")
    except ValueError:
        return None
    values = layer.sampled(SAMPLES)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def check_sample(directory: Path, path: str, layer: AdapterLinear, saved: str) -> None:
    """Compare the base weight with what the file says of it, up to the rounding between floating dtypes."""
    now = sample(layer)
    if now is None:
        return
    try:
        was, is_ = (base64.b64decode(text) for text in (saved, now))
        was, is_ = (torch.tensor(struct.unpack(f"<{len(is_) // 4}f", values)) for values in (was, is_))
    except (TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{directory}: got a damaged note on {path!r} ({error}), wanted values") from None
    slack = 2**-8 * was.square().mean().sqrt().item()
    if not torch.allclose(is_, was, rtol=2**-8, atol=slack):
        raise ValueError(
            f"{directory}: got a model whose {path!r} has other base weights than the adapter was trained on, wanted"
            " that base (check_base=False loads it all the same)"
        )
