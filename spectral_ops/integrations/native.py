"""A model with native adapters as a PeftModel, for what asks ``isinstance(model, PeftModel)``: TRL, above all.

PeftModel puts adapters of its own in; this one goes around those that are there. What PeftModel does with adapters is
done with ours or raises by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from spectral_ops import adapters
from spectral_ops._files import safetensors as _safetensors
from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters import AdapterLinear
from spectral_ops.adapters import pretrained as native
from spectral_ops.adapters.checkpoints import refill, save_adapters
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.files.saved_config import read_config
from spectral_ops.adapters.files.tensors import PREFIX
from spectral_ops.adapters.io import WEIGHTS
from spectral_ops.adapters.model import switch
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.trained_tokens import TrainedTokens
from spectral_ops.adapters.tree import active_adapter, adapter_configs, adapter_layers, units, unwrap

REFERENCE = "ref"  # TRL's name for the adapter that it measures the trained one against


def as_peft_model(model: nn.Module) -> AdaptedPeftModel:
    """The model, which :func:`attach` has given adapters, inside a ``peft.PeftModel``; they are its adapters.

    Pass it to a trainer in place of the model: Trainer then saves, resumes and reloads the best adapter as it does
    PEFT's, and TRL's DPO, KTO, GRPO and RLOO take their reference from this model without its adapter, or with the
    adapter as it was at the start, instead of loading a second model. ``wrapped.get_base_model()`` is the model again.

    Raises ValueError where the model has no adapters, or one on its output head, whose weight TRL reads past the layer;
    TypeError for something that is not a module.
    """
    if isinstance(model, PeftModel):
        raise ValueError(f"model: got a {type(model).__name__}, wanted the model itself")
    root = unwrap(model)
    if not adapter_configs(root):
        raise ValueError("model: got no adapters, wanted those of spectral_ops.attach(model, config)")
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    if isinstance(head, AdapterLinear):
        raise ValueError(
            "model: got an adapter on the output head, wanted none: TRL reads that weight past the layer. A head trains"
            " whole in modules_to_save"
        )
    return AdaptedPeftModel(root)


class View:
    """An adapter's config with what PeftModel's callers ask PEFT's configs for besides."""

    is_prompt_learning = is_adaption_prompt = False
    inference_mode = False
    auto_mapping = revision = None

    def __init__(self, config: AdapterConfig, name: str, base: str | None) -> None:
        self.config, self.name, self.base_model_name_or_path = config, name, base

    def __getattr__(self, field: str) -> Any:
        if field == "config":  # a copy is being made
            raise AttributeError(field)
        return getattr(self.config, field)

    @property
    def target_parameters(self) -> list[str] | None:
        return getattr(self.config, "target_parameters", None)

    def __repr__(self) -> str:
        return repr(self.config)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's fields."""
        return {**self.config.peft_fields(), "base_model_name_or_path": self.base_model_name_or_path}


class Tuner(nn.Module):
    """Stands where PEFT's tuner does, between the PeftModel and the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        if not hasattr(self.model, name):
            raise AttributeError(f"{name}: neither served by as_peft_model nor of {type(self.model).__name__}")
        return getattr(self.model, name)

    @property
    def peft_config(self) -> dict[str, View]:
        base = getattr(getattr(self.model, "config", None), "_name_or_path", None) or None
        return native.Configs({n: View(config, n, base) for n, config in adapter_configs(self.model).items()})

    @property
    def active_adapters(self) -> list[str]:
        name = active_adapter(self.model)
        return [] if name is None else [name]

    def disable_adapter_layers(self) -> None:
        """Run without adapters until they are enabled."""
        switch(self.model, False)

    def enable_adapter_layers(self) -> None:
        """Run with adapters again."""
        switch(self.model, True)

    def merge_adapter(self, adapter_names=None, safe_merge: bool = False) -> None:
        """:func:`merge`; adapter_names may name the active one only."""
        self._only_active(adapter_names)
        adapters.merge(self.model, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """:func:`unmerge`."""
        adapters.unmerge(self.model)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names=None) -> nn.Module:
        """Merge, detach, and return the model."""
        self.merge_adapter(adapter_names, safe_merge)
        return adapters.detach(self.model)

    def unload(self) -> nn.Module:
        """Detach, and return the model."""
        return adapters.detach(self.model)

    def _only_active(self, names) -> None:
        if names is not None and list(names) != self.active_adapters:
            raise NotImplementedError(f"adapter_names: got {names}, wanted the active one ({self.active_adapters})")


class AdaptedPeftModel(PeftModel):
    """See :func:`as_peft_model`."""

    holds_adapted_model = True  # for adapters.tree.unwrap

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)  # PeftModel's would inject PEFT's layers
        self._is_prompt_learning, self._peft_config = False, None
        self.special_peft_forward_args: set[str] = set()
        self._adapters_disabled = False
        self.base_model = Tuner(model)
        self.train(model.training)

    # the model

    def get_base_model(self) -> nn.Module:
        """The model that has the adapters."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        return native.trainable_parameters(self.base_model.model)

    # which adapter

    @property
    def peft_config(self) -> dict[str, View]:
        """The adapters' configs by name. Read-only."""
        return self.base_model.peft_config

    @property
    def peft_type(self) -> str:
        return next(iter(self.peft_config.values())).peft_type

    @property
    def active_adapter(self) -> str | None:
        return active_adapter(self.base_model.model)

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """:func:`spectral_ops.set_adapter`; inference_mode leaves it frozen."""
        adapters.set_adapter(self.base_model.model, adapter_name)
        if inference_mode:
            self._train(None)

    def _train(self, name: str | None) -> None:
        """Let the parameters of one adapter train, or of none."""
        for unit in units(self.base_model.model).values():
            unit.train_only([] if name is None else [name])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the model without adapters inside the ``with`` block."""
        before = self._adapters_disabled
        with adapters.disabled(self.base_model.model):
            self._adapters_disabled = True
            try:
                yield
            finally:
                self._adapters_disabled = before

    def add_adapter(self, adapter_name: str, peft_config, low_cpu_mem_usage: bool = False, autocast_adapter_dtype=True):
        """:func:`attach` without making it the active one; under the name "ref", a frozen copy of an adapter.

        peft_config: a config of spectral_ops, or one of :attr:`peft_config`. TRL gives "ref" the config of the adapter
        that is to be trained, and wants its values at the start.
        """
        root = self.base_model.model
        if isinstance(peft_config, View) and adapter_name == REFERENCE:
            copy_adapter(root, peft_config.name, adapter_name)
            return
        config = peft_config.config if isinstance(peft_config, View) else peft_config
        if not isinstance(config, AdapterConfig):
            raise TypeError(f"peft_config: got {type(config).__name__}, wanted a config of spectral_ops")
        with self._as_it_trains():
            adapters.attach(root, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    @contextmanager
    def _as_it_trains(self) -> Iterator[None]:
        """Keep the active adapter, and what trains, over a change that would make another one active."""
        root = self.base_model.model
        active, trains = self.active_adapter, {id(p): (p, p.requires_grad) for p in root.parameters()}
        try:
            yield
        finally:
            if active is not None:
                adapters.set_adapter(root, active)
            for parameter, flag in trains.values():
                parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """:func:`detach`, of an adapter that is not the only one."""
        configs = self.peft_config
        if adapter_name in configs and len(configs) == 1:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}, the only one, wanted another (unload() takes it out)"
            )
        if adapter_name in configs and configs[adapter_name].changes_base and REFERENCE in configs:
            raise ValueError(f"adapter_name: got {adapter_name!r}, on whose base {REFERENCE!r} stands, wanted another")
        native.remove_adapters(self.base_model.model, adapter_name)

    # files

    def save_pretrained(
        self, save_directory, safe_serialization: bool = True, selected_adapters=None, save_embedding_layers="auto",
        is_main_process: bool = True, path_initial_model_for_weight_conversion=None, state_dict=None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write the adapters as PEFT lays them out, in the form that is trained.

        path_initial_model_for_weight_conversion: any path writes PiSSA and MiLoRA as plain LoRA; nothing is read there.
        state_dict: where to take the tensors from, by their names in ``self.state_dict()``.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: got False, wanted True")
        if not is_main_process:
            return
        options: dict[str, Any] = {"save_embedding_layers": save_embedding_layers}
        if state_dict is not None:
            options["state_dict"] = {key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
        plain = path_initial_model_for_weight_conversion is not None
        save_adapters(self.base_model.model, save_directory, selected_adapters, plain=plain, **options)

    def load_adapter(
        self, model_id, adapter_name: str, is_trainable: bool = False, torch_device=None,
        autocast_adapter_dtype: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Fill an adapter that is there from a local folder, or load one more; the active one stays so."""
        folder = Path(native.local_folder(model_id, "model_id"))
        root = self.base_model.model
        if adapter_name in (known := adapter_configs(root)):
            config = read_config(folder)
            if type(config) is not type(known[adapter_name]):
                wanted = type(known[adapter_name]).__name__
                raise ValueError(f"model_id: got {str(folder)!r} with {type(config).__name__}, wanted {wanted}")
            refill(root, adapter_name, _safetensors().torch.load_file(folder / WEIGHTS), folder / WEIGHTS)
            return
        with self._as_it_trains():
            adapters.load_adapter(root, folder, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def copy_adapter(model: nn.Module, source: str, name: str) -> None:
    """Add a frozen copy of adapter ``source``, over the same base, whatever its initialisation did to that."""
    root = unwrap(model)
    configs = adapter_configs(root)
    if name in configs:
        raise ValueError(f"adapter_name: got {name!r}, wanted a name this model does not have yet")
    if configs[source].bias != "none":
        raise ValueError(
            f"bias: got {configs[source].bias!r}, wanted 'none': the base's biases train, so {name!r} would follow them"
        )
    layers = {path: layer for path, layer in adapter_layers(root).items() if source in layer.settings}
    for path, layer in layers.items():
        dtypes = {getattr(layer, key)[source].dtype for key in layer.trainable(source) if key in layer.held(source)}
        wide = all(dtype is accumulate_dtype(dtype) for dtype in dtypes)
        options = {"autocast_adapter_dtype": wide, "initialise": False, "beside": source}
        layer.add_adapter(name, copy.copy(layer.configs[source]), path, **options)
    type(next(iter(layers.values()))).link(layers, name)
    for layer in layers.values():
        for key in (*layer.held(source), *layer.initial_keys):
            if source not in (tensors := getattr(layer, key)):
                continue
            if key in layer.tied_keys or not isinstance(tensors, nn.ParameterDict):
                with torch.no_grad():
                    tensors[name].copy_(tensors[source])
            else:
                tensors[name] = nn.Parameter(tensors[source].detach().clone(), requires_grad=False)
        if hasattr(layer, "left") and source in layer.left:
            layer.left[name] = list(layer.left[source])
    for unit in units(root).values():
        if isinstance(unit, TrainedCopy) and source in unit.copies:
            unit.copies[name] = copy.deepcopy(unit.copies[source]).requires_grad_(False)
        if isinstance(unit, TrainedTokens) and source in unit.rows:
            unit.add_adapter(name, unit.indices[source], autocast_adapter_dtype=False)
            unit.rows[name] = nn.Parameter(unit.rows[source].detach().clone(), requires_grad=False)


def _refusing(name: str):
    def refuse(*args: Any, **kwargs: Any):
        raise NotImplementedError(f"{name}: not served by as_peft_model (the model itself is .get_base_model())")

    refuse.__name__ = name
    return refuse


# what PeftModel does by way of what is served here
KEPT = {"print_trainable_parameters", "push_to_hub", "prepare_model_for_gradient_checkpointing"}
for _name in dir(PeftModel):
    if not (_name.startswith("_") or hasattr(nn.Module, _name) or _name in KEPT or _name in vars(AdaptedPeftModel)):
        if callable(getattr(PeftModel, _name)):
            setattr(AdaptedPeftModel, _name, _refusing(_name))
