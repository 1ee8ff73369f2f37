"""What a transformers model does with its adapters: PreTrainedModel's methods for PEFT, over ours.

:func:`attach` puts :class:`Adapted` in front of the model's own class, in place; :func:`detach` of the last adapter
takes it away again. Nothing here imports transformers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from spectral_ops.adapters import adopted
from spectral_ops.adapters.checkpoints import (
    WHOLE,
    in_whole_file,
    leave_whole_file,
    refill,
    save_adapters,
)
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.files.tensors import PREFIX, held_tensors
from spectral_ops.adapters.io import load_adapter
from spectral_ops.adapters.model import attach, detach, set_adapter, switch
from spectral_ops.adapters.tree import active_adapter, adapter_configs, adapter_layers, unwrap

# --- of any module ---------------------------------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are, as PEFT counts them.

    A 4-bit weight counts its elements, a ZeRO-3 shard the whole. What an adapter holds without ever training it (VeRA's
    projections, the pair that PiSSA starts from) does not count. Raises TypeError for something that is not a module.
    """
    fixed = set()
    for layer in adapter_layers(model).values():
        for name in layer.adapter_names:
            for key in {*layer.held(name), *layer.initial_keys} - {*layer.trainable(name)}:
                if name in (tensors := getattr(layer, key)):
                    fixed.add(id(tensors[name]))
    trained = total = 0
    for parameter in model.parameters():
        if id(parameter) in fixed:
            continue
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of any module train, in PEFT's words and by its count.

    A 4-bit weight counts its elements, a ZeRO-3 shard the whole. What an adapter holds without ever training it (VeRA's
    projections, the pair that PiSSA starts from) does not count. Raises TypeError for something that is not a module.
    """
    trained, total = trainable_parameters(model)
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def remove_adapters(model: nn.Module, names: str | list[str]) -> None:
    """Detach these adapters. Where the active one goes and others stay, the first of them becomes active."""
    names = [names] if isinstance(names, str) else list(names)
    root = unwrap(model)
    known = adapter_configs(root)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"adapter_names: got {missing}, wanted names of {sorted(known)}")
    for name in names:
        detach(root, name)
    left = list(adapter_configs(root))
    if left and active_adapter(root) is None:
        warnings.warn(f"the active adapter is deleted: {left[0]!r} is active now", stacklevel=3)
        set_adapter(root, left[0])


def local_folder(directory, name: str) -> str:
    """``directory`` where it is one; ValueError where it may be the name of a repository."""
    if directory is None or not Path(directory).is_dir():
        raise ValueError(
            f"{name}: got {directory!r}, wanted a local folder (huggingface_hub.snapshot_download makes one)"
        )
    return directory


class Configs(dict):
    """The configs of a model's adapters by name. Read-only: PEFT, which writes its own here before it puts adapters
    over ours, is told so."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "model: got one with adapters of spectral_ops, wanted one without for PEFT's own."
            " spectral_ops.attach(model, config, name) adds an adapter, spectral_ops.detach(model) takes them out"
        )

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __reduce__(self):
        return dict, (dict(self),)


# --- of a transformers model -----------------------------------------------------------------------------------------


class Adapted:
    """In front of a transformers model's class while it has adapters: files, and PreTrainedModel's adapter methods."""

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers asks for: a quantised model trains, and checkpointing lets gradients through its inputs."""
        return bool(adapter_configs(self))

    @property
    def peft_config(self) -> Configs:
        """The config of every adapter, by name. Read-only."""
        return Configs(adapter_configs(self))

    @peft_config.setter
    def peft_config(self, value: Any) -> NoReturn:
        Configs()._refuse()

    # files

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        *,
        selected_adapters=None,
        **more,
    ) -> None:
        """Write the adapters only, as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

        The files hold the form that is trained (PiSSA as PiSSA; :func:`save_adapter` writes plain LoRA).
        model.safetensors beside them, a link, is what Trainer resumes from. ``self.load_adapter`` and
        :func:`load_adapter` read the folder.

        is_main_process: False writes nothing. state_dict: where to take the tensors from, by their names in
        ``self.state_dict()`` (gathered ones, where parameters are sharded). push_to_hub: upload as well, with repo_id,
        token and what else ``push_to_hub`` takes. max_shard_size and save_original_format have no effect. Raises
        ValueError for what only a whole model has (variant, distributed_checkpoint, no safetensors).
        """
        if not adapter_configs(self):  # fully_shard has put a class over this one, which detach left there
            options = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            return super().save_pretrained(save_directory, **options, **more)
        for name, default in (("safe_serialization", True), ("variant", None), ("distributed_checkpoint", False)):
            if more.pop(name, default) not in (default, None):
                raise ValueError(f"{name}: got another value than {default}, wanted that, as only adapters are saved")
        if not more.pop("save_peft_format", True):
            raise ValueError("save_peft_format: got False, wanted True (adapter files are in PEFT's format)")
        for name in ("max_shard_size", "save_original_format"):
            more.pop(name, None)
        repo_id = more.pop("repo_id", None)
        if more and not push_to_hub and set(more) != {"token"}:
            raise TypeError(f"save_pretrained: got {sorted(more)}, wanted no other arguments than PreTrainedModel's")
        if not is_main_process:
            return
        if state_dict is not None and not state_dict:
            warnings.warn("state_dict: got an empty one: no adapter is saved", stacklevel=2)
            return
        options = {} if state_dict is None else {"state_dict": state_dict}
        leave_whole_file(Path(save_directory), save_adapters(self, save_directory, selected_adapters, **options))
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **more)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As ever; and the tensors of an adapter file fill that adapter, and leave nothing missing."""
        found = in_whole_file(state_dict, active_adapter(self))
        if not found:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        for name, tensors in found.items():
            refill(self, name, tensors, WHOLE)
        return _IncompatibleKeys([], [])

    # adapters

    def add_adapter(self, adapter_config, adapter_name=None) -> None:
        """:func:`attach`. Raises TypeError for PEFT's configs."""
        if not isinstance(adapter_config, AdapterConfig):
            raise TypeError(
                f"adapter_config: got {type(adapter_config).__name__}, wanted a config of spectral_ops (PEFT's adapters"
                " do not go over these; spectral_ops.detach(model) takes them out)"
            )
        attach(self, adapter_config, adapter_name or "default")

    def load_adapter(self, peft_model_id=None, adapter_name=None, *, is_trainable=False, **more) -> None:
        """:func:`load_adapter` from a local folder; it becomes active. ValueError for arguments beyond these."""
        if given := {name for name, value in more.items() if value not in (None, False, "auto", {})}:
            raise ValueError(f"load_adapter: got {sorted(given)}, wanted peft_model_id, adapter_name and is_trainable")
        folder = local_folder(peft_model_id, "peft_model_id")
        load_adapter(self, folder, adapter_name or "default", trainable=is_trainable)

    def set_adapter(self, adapter_name) -> None:
        """:func:`set_adapter`; a list must hold one name."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"adapter_name: got {names}, wanted one (spectral_ops.segments runs several at once)")
        set_adapter(self, names[0])

    def active_adapters(self) -> list[str]:
        """The active adapter, in a list; an empty one where none is."""
        name = active_adapter(self)
        return [] if name is None else [name]

    def disable_adapters(self) -> None:
        """Run the model without adapters until :meth:`enable_adapters`; a merged one is taken out of the weights."""
        switch(self, False)

    def enable_adapters(self) -> None:
        """End :meth:`disable_adapters`."""
        switch(self, True)

    def delete_adapter(self, adapter_names) -> None:
        """:func:`detach`, of one name or a list; with the last, the model is what it was before :func:`attach`."""
        remove_adapters(self, adapter_names)

    def get_adapter_state_dict(self, adapter_name=None, state_dict=None) -> dict[str, torch.Tensor]:
        """What a file holds of an adapter (default: the active one), in its trained form, without the prefix."""
        if state_dict is not None:
            raise ValueError("state_dict: got one, wanted None: the tensors are the model's own")
        name = active_adapter(self) if adapter_name is None else adapter_name
        if name not in (known := adapter_configs(self)):
            raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {sorted(known)}")
        held, others = held_tensors(self, name)
        every = {key: tensor for group in (*held.values(), others) for key, tensor in group.items()}
        return {key.removeprefix(PREFIX): tensor.detach() for key, tensor in every.items()}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are, as PEFT counts them."""
        return trainable_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both, in PEFT's words."""
        print_trainable_parameters(self)

    # copies

    def __reduce_ex__(self, protocol):
        make, arguments, *state = super().__reduce_ex__(protocol)
        original = adopted.original_class(type(self))
        if original is None:  # a wrapper of its own is over this class
            return make, arguments, *state
        return adopted.restored, (original,), *state


adopted.mixin = Adapted
