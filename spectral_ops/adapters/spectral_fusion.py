"""One Spectral Adapter from several (METHODS 2; arXiv:2405.13952, section on adapter fusion)."""

from __future__ import annotations

import dataclasses

from spectral_ops.adapters.base import check_adapter_name
from spectral_ops.adapters.model import set_adapter
from spectral_ops.adapters.spectral import SpectralConfig
from spectral_ops.adapters.tree import adapter_configs, adapter_layers, unwrap


def fuse_spectral(model, adapter_names, adapter_name="fused"):
    """Make one Spectral Adapter whose update is the sum of those of ``adapter_names``, and make it active.

    The adapters share one mode, ``residual`` False, and the layers they are on; give each triplets of its own
    (``start``), so that they do not move the same directions. The new one holds copies of their tensors side by side
    (rotations: in diagonal blocks), its rank is the sum of theirs, and it trains, merges and saves like any other: what
    was trained apart can be trained on together. The old ones stay; ``detach(model, name)`` drops them.

    Returns the model. Raises TypeError/ValueError that name the argument, and leaves the model untouched.
    METHODS 2, arXiv:2405.13952.
    """
    root = unwrap(model)
    configs = adapter_configs(root)
    listed = isinstance(adapter_names, (list, tuple)) and len(adapter_names) > 0
    if not listed or len(set(adapter_names)) != len(adapter_names):
        raise ValueError(f"adapter_names: got {adapter_names!r}, wanted a list of different names")
    for name in adapter_names:
        if name not in configs:
            raise ValueError(f"adapter_names: got {name!r}, wanted names among {sorted(configs)}")
        if not isinstance(configs[name], SpectralConfig):
            raise TypeError(f"adapter_names: got {name!r}, a {type(configs[name]).__name__}, wanted Spectral Adapters")
    check_adapter_name(adapter_name)
    if adapter_name in configs:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted a name this model does not have yet")
    chosen = [configs[name] for name in adapter_names]
    for field in ("mode", "bias", "spectral_dropout"):
        values = [getattr(config, field) for config in chosen]
        if len(set(values)) > 1:
            raise ValueError(f"adapter_names: got adapters with {field} {values}, wanted one {field}")
    if any(config.residual or config.modules_to_save for config in chosen):
        raise ValueError("adapter_names: got residual=True or modules_to_save, wanted updates that add up")
    layers = {p: layer for p, layer in adapter_layers(root).items() if set(adapter_names) & set(layer.settings)}
    for path, layer in layers.items():
        if lacked := [name for name in adapter_names if name not in layer.settings]:
            raise ValueError(f"adapter_names: got {lacked[0]!r}, which {path!r} lacks, wanted one on each layer")
        if layer.merged is not None:
            raise ValueError(f"adapter_names: got {layer.merged!r}, merged in {path!r}, wanted unmerged adapters")
    config = dataclasses.replace(
        chosen[0], r=sum(config.r for config in chosen), start=min(config.start for config in chosen)
    )
    d, k = (min(getattr(layer, side) for layer in layers.values()) for side in ("out_features", "in_features"))
    if config.start + config.r > min(d, k):
        config.wrong("r", config.r, f"at most {min(d, k)} - start ({config.start}), for the smallest weight")
    for layer in layers.values():
        layer.fuse(list(adapter_names), adapter_name, config)
    return set_adapter(model, adapter_name)
