"""What every method shares: a linear layer holding named adapters over a frozen base.

A method is one file: a config (see config.py) and a subclass of :class:`AdapterLinear` that states its tensors
(``tensor_keys``, ``shapes``), how they start (``reset``), the one operator it calls (``adapted``) and what a merge adds
(``delta``). :mod:`spectral_ops.adapters.methods` lists it; nothing else knows it by name. Access to the base weight is
in frozen.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.config import AdapterConfig
from spectral_ops.adapters.frozen import FrozenBase, why_not_dense
from spectral_ops.adapters.tensor_dicts import BufferDict, TiedDict
from spectral_ops.core import checks


class AdapterLinear(FrozenBase):
    """A frozen linear layer and its named adapters, one of them active.

    ``base_layer`` is the layer as it was; each name in ``tensor_keys`` is an ``nn.ParameterDict`` from adapter names to
    that tensor, in ``index_keys`` a :class:`BufferDict`. ``settings[name]`` is the adapter's config as it applies here,
    ``configs[name]`` as it was attached.
    """

    config_type: ClassVar[type[AdapterConfig]]
    tensor_keys: ClassVar[dict[str, str]]  # ParameterDict -> what follows the module's path in PEFT's file
    tied_keys: ClassVar[frozenset[str]] = frozenset()  # those of tensor_keys that link() makes, one for several layers
    index_keys: ClassVar[dict[str, str]] = {}  # int32 buffers
    initial_keys: ClassVar[dict[str, str]] = {}  # frozen tensors that undo an initialisation which changed the base

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in (*self.tensor_keys, *self.initial_keys):
            setattr(self, name, TiedDict() if name in self.tied_keys else nn.ParameterDict())
        for name in self.index_keys:
            setattr(self, name, BufferDict())
        self.configs: dict[str, AdapterConfig] = {}
        self.settings: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self._undo: tuple[torch.Tensor, ...] | None = None
        self._snapshot: Any = None  # the weight before a merge: [d, k], or what a quantised layer held
        self._disabled = 0
        self.train(base_layer.training)

    @classmethod
    def from_linear(cls, linear, config, adapter_name="default", *, autocast_adapter_dtype=True):
        """An adapted copy of ``linear`` (nn.Linear or Conv1D, shared, not copied; its parameters are frozen).

        ``config`` is this method's config; adapter parameters are float32 over a bf16/fp16 base unless
        ``autocast_adapter_dtype`` is False, float64 over float64. PiSSA and MiLoRA change ``linear``'s weight.
        """
        if not isinstance(config, cls.config_type):
            raise TypeError(f"config: got {type(config).__name__}, wanted {cls.config_type.__name__}")
        layer = cls(linear)
        layer.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        cls.link({"": layer}, adapter_name)
        linear.requires_grad_(False)
        layer.commit(adapter_name)
        layer.set_active(adapter_name)
        return layer

    # what a method states

    @classmethod
    def shapes(cls, config: AdapterConfig, d: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of ``tensor_keys`` that an adapter has on a layer [d, k]; ValueError where ``config`` does
        not fit."""
        raise NotImplementedError

    def reset(self, name: str) -> None:
        """Initialise the tensors of adapter ``name``; must not touch the base (see :meth:`commit`)."""
        raise NotImplementedError

    def adapted(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The layer's output under adapter ``name``: one operator, called through :meth:`fused`."""
        raise NotImplementedError

    def delta(self, name: str) -> torch.Tensor:
        """What adapter ``name`` adds to the base weight: [d, k], float32 (float64); called under no_grad.

        A method whose merge does more overrides :meth:`merged_weight`: DoRA scales the rows of the sum.
        """
        raise NotImplementedError

    # what a method may state

    def merged_weight(self, weight: torch.Tensor, name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """The adapted weight from ``weight`` [d, k] float32, and the tensors that :meth:`unmerged_weight` will need.

        None in their place: arithmetic cannot undo this merge, so a copy of the weight is kept.
        """
        return weight + self.delta(name), ()

    def unmerged_weight(self, weight: torch.Tensor, name: str, *undo: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`merged_weight`."""
        return weight - self.delta(name)

    def admit(self, config: AdapterConfig) -> None:
        """Raise ValueError where this layer cannot take another adapter of ``config``."""

    def commit(self, name: str) -> None:
        """Take out of the base weight what the initialisation moved into the adapter."""

    @classmethod
    def link(cls, layers: dict[str, AdapterLinear], name: str) -> None:
        """Make and tie what layers (by path) share under adapter ``name``. Called once all of them are built.

        Until then the tensors of ``tied_keys`` have no memory: :meth:`reset` must leave them alone.
        """

    @classmethod
    def file_key(cls, path: str, suffix: str) -> str:
        """The key in PEFT's file of a tensor of the layer at ``path``. A tensor that layers share has one key."""
        return f"base_model.model.{path}.{suffix}"

    def placed(self, name: str, sharing: list[str]) -> None:
        """Called by attach with the other modules that hold memory of the base weight. May raise ValueError."""

    @classmethod
    def index_shapes(cls, config: AdapterConfig, d: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor an adapter has of ``index_keys``; they start at zero."""
        return {}

    @classmethod
    def check_tensors(cls, config: AdapterConfig, d: int, k: int, tensors: dict[str, torch.Tensor]) -> None:
        """Raise ValueError or IndexError where the content of ``tensors``, read from a file, makes no adapter."""

    @classmethod
    def initial_shapes(cls, config: AdapterConfig, d: int, k: int) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of ``initial_keys``."""
        return {}

    def set_initial(self, name: str, *tensors: torch.Tensor) -> None:
        """Record the tensors of ``initial_keys``."""

    def restore(self) -> None:
        """Put back what :meth:`commit` took."""

    def check_undo(self, name: str) -> None:
        """Raise ValueError where a merge of adapter ``name`` could not be undone without a copy of the weight."""

    def original(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output without adapters."""
        return self.product(x)

    def original_weight(self) -> torch.Tensor:
        """The weight [d, k] as it was before any adapter, in float32 (float64), merged or not. It may share memory."""
        return self.unmerged()

    @torch.no_grad()
    def sampled(self, count: int) -> list[float]:
        """Evenly spaced values of the base weight as it was before any adapter, by which one tells it from another."""
        weight = self.original_weight() if self.changed else self.matrix
        places = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float64).long().to(weight.device)
        return weight[places // weight.shape[1], places % weight.shape[1]].float().tolist()

    def fitted(self, config: AdapterConfig, path: str) -> AdapterConfig:
        """``config`` as it applies to this layer at ``path``; what :attr:`settings` holds."""
        return config.for_layer(path)

    def tensor_shapes(self, settings: AdapterConfig, initial: bool = False) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor an adapter of ``settings`` has here, but ``index_keys``; with ``initial_keys``."""
        sizes = settings, self.out_features, self.in_features
        return self.shapes(*sizes) | (self.initial_shapes(*sizes) if initial else {})

    def indices(self, settings: AdapterConfig) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of ``index_keys``."""
        return self.index_shapes(settings, self.out_features, self.in_features)

    def suffixes(self, settings: AdapterConfig) -> dict[str, str]:
        """What follows the module's path in a file, for every tensor that an adapter of ``settings`` may have."""
        return self.tensor_keys | self.index_keys | self.initial_keys

    def starts(self, name: str) -> dict[str, str]:
        """The entries of ``initial_keys`` that adapter ``name`` has where its initialisation changes the base."""
        return self.initial_keys

    def trainable(self, name: str) -> tuple[str, ...]:
        """Which of ``tensor_keys`` adapter ``name`` trains."""
        return tuple(self.tensor_keys)

    def held(self, name: str) -> dict[str, str]:
        """The entries of ``tensor_keys`` and ``index_keys`` that adapter ``name`` has."""
        return {k: suffix for k, suffix in {**self.tensor_keys, **self.index_keys}.items() if name in getattr(self, k)}

    def saved(self, name: str) -> dict[str, str]:
        """Those of :meth:`held` that a file has."""
        return {key: s for key, s in self.held(name).items() if key not in self.settings[name].unsaved}

    def file_tensors(self, name: str, plain: bool) -> dict[str, torch.Tensor]:
        """What a file holds of adapter ``name``, by the key that follows the module's path.

        plain: in a form that another library loads onto the original base. Otherwise in the form this class trains.
        """
        return {suffix: getattr(self, key)[name].detach() for key, suffix in self.saved(name).items()}

    # what all methods do alike

    @property
    def changed(self) -> bool:
        """Whether the base weight is not the original one at the moment."""
        return self.merged is not None or any(config.changes_base for config in self.settings.values())

    @property
    def adapter_names(self) -> list[str]:
        """The adapters this layer holds."""
        return list(self.settings)

    def parameter(self, key: str, name: str) -> torch.Tensor:
        """``self.<key>[name]``, past what nn.Module and nn.ParameterDict look up on the way."""
        holder = self._modules[key]
        found = holder._parameters.get(name)
        return holder[name] if found is None else found

    def add_adapter(
        self, name, config, path="", *, autocast_adapter_dtype=True, initialise=True, beside: str | None = None
    ):
        """Give the layer an adapter, not active yet; leaves the base alone. ``path`` resolves the config's patterns.

        beside: an adapter whose values the new one is going to have, so that the base is right for it as it is.
        """
        check_adapter_name(name)
        if name in self.settings:
            raise ValueError(f"adapter_name: got {name!r}, wanted a name this layer does not have yet")
        if self.merged is not None:
            raise ValueError(f"adapter_name: got {name!r} while {self.merged!r} is merged, wanted an unmerged layer")
        if beside is None:
            self.admit(config)
        settings, weight = self.fitted(config, path), self.weight
        shapes = self.tensor_shapes(settings)
        dtype = weight.dtype if weight.dtype in checks.FLOATS else torch.float32
        if autocast_adapter_dtype:
            dtype = accumulate_dtype(dtype)
        self.configs[name], self.settings[name] = config, settings
        try:
            for key, shape in shapes.items():
                device = "meta" if key in self.tied_keys else weight.device
                tensor = torch.empty(shape, dtype=self.parameter_dtype(key, dtype), device=device)
                getattr(self, key)[name] = nn.Parameter(tensor, requires_grad=False)
            for key, shape in self.indices(settings).items():
                with torch.inference_mode(False):  # their versions are watched
                    getattr(self, key)[name] = torch.zeros(shape, dtype=torch.int32, device=weight.device)
            if initialise:
                with torch.no_grad():
                    self.reset(name)
        except BaseException:
            self.remove_adapter(name)
            raise

    def parameter_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype tensor ``key`` is held in, where adapters are in ``dtype``."""
        return dtype

    def remove_adapter(self, name: str) -> None:
        """Forget adapter ``name``."""
        self.release()
        for key in (*self.tensor_keys, *self.index_keys, *self.initial_keys):
            if name in getattr(self, key):
                del getattr(self, key)[name]
        self.configs.pop(name, None)
        self.settings.pop(name, None)
        self.active = None if self.active == name else self.active

    def set_active(self, name: str) -> None:
        """Make ``name`` the active adapter and the only one that trains; a layer without it runs its base."""
        if self.merged not in (None, name):
            raise ValueError(f"adapter_name: got {name!r} while {self.merged!r} is merged, wanted unmerge() first")
        self.release()
        self.active = name
        self.train_only([name])
        if self.bias is not None and any(config.bias != "none" for config in self.settings.values()):
            self.bias.requires_grad_(name in self.settings and self.settings[name].bias != "none")

    def train_only(self, names: Collection[str]) -> None:
        """Let the parameters of these adapters train, and of no other."""
        for key in self.tensor_keys:
            for owner, parameter in getattr(self, key).items():
                parameter.requires_grad_(owner in names and key in self.trainable(owner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        if self.merged is not None:
            return self.product(x)
        if self._disabled or self.active not in self.settings:
            return self.original(x)
        return self.adapted(x, self.active)

    @torch.no_grad()
    def delta_weight(self, adapter_name: str | None = None) -> torch.Tensor:
        """What a merge of the adapter (default: the active one) adds to the base weight: [d, k], float32 (float64)."""
        return self.delta(self._known(adapter_name))

    @torch.no_grad()
    def merge(self, *, safe: bool = False, keep_base: bool = False) -> None:
        """Put the active adapter into the base weight, in float32 and cast once. Without one, nothing happens.

        safe: raise ValueError, and change nothing, if that would hold a non-finite value. keep_base: keep a copy of the
        weight, which :meth:`unmerge` restores bit for bit. Without it unmerge does the arithmetic backwards.
        """
        if self.merged is not None or self.active not in self.settings:
            return
        new, undo = self.merge_result()
        if safe and not torch.isfinite(new).all():
            raise ValueError(f"adapter {self.active!r}: got non-finite merged weights, wanted finite ones (safe=True)")
        keep_base = keep_base or undo is None or not self.is_dense  # a quantised weight is never got back by arithmetic
        if not keep_base:
            self.check_undo(self.active)
        self._snapshot = self.hold_matrix() if keep_base else None
        self.write_matrix(new)
        self.merged, self._undo = self.active, undo

    @torch.no_grad()
    def merges_finite(self) -> bool:
        """Whether a merge of the active adapter would hold finite values only."""
        return bool(torch.isfinite(self.merge_result()[0]).all())

    def merge_result(self):
        """The weight a merge would write, in the base's dtype (float32 for a quantised one), and its undo tensors."""
        self.readable("merge")
        new, undo = self.merged_weight(self.full_matrix(), self.active)
        return new.to(self.matrix.dtype) if self.is_dense else new, undo

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapter out of the base weight again; nothing where none is merged."""
        if self.merged is None:
            return
        if self._snapshot is not None:
            self.put_back_matrix(self._snapshot)
        else:
            self.matrix.copy_(self.unmerged())
        self.merged = self._undo = self._snapshot = None

    @torch.no_grad()
    def unmerged(self) -> torch.Tensor:
        """The base weight [d, k] without what is merged into it, in float32 (float64)."""
        weight = self.full_matrix()
        if self.merged is None:
            return weight
        if self._snapshot is None:
            return self.unmerged_weight(weight, self.merged, *(t.to(weight.device) for t in self._undo))
        if self.is_dense:
            return self._snapshot.to(weight)
        merged = self.hold_matrix()
        self.put_back_matrix(self._snapshot)
        try:
            return self.full_matrix()
        finally:
            self.put_back_matrix(merged)

    def bare(self) -> nn.Module:
        """What stays where the last adapter goes: the base layer, which gets back what an initialisation took."""
        if self.merged is None:
            self.restore()
        return self.base_layer

    def _known(self, name: str | None) -> str:
        name = self.active if name is None else name
        if name not in self.settings:
            raise ValueError(f"adapter_name: got {name!r}, wanted one of {self.adapter_names}")
        return name

    def describe_adapter(self, name: str) -> str:
        """The adapter's settings for ``repr``."""
        return f"r={self.settings[name].r}"

    def extra_repr(self) -> str:
        """in_features, out_features, every adapter, and whether one is merged or the base runs by itself."""
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        parts += [
            f"{name}{'*' if name == self.active else ''}: {self.describe_adapter(name)}" for name in self.settings
        ]
        parts += [f"merged={self.merged!r}"] if self.merged else []
        reason = why_not_dense(self.base_layer)
        return ", ".join([*parts, f"base-agnostic ({reason})"] if reason else parts)


def check_adapter_name(name: Any) -> None:
    """An adapter's name: a non-empty string without dots that nn.ParameterDict can hold."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: got {checks.describe(name)}, wanted a string")
    if not name or "." in name or hasattr(nn.ParameterDict, name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter_name: got {name!r}, wanted a name without dots that no method of a dict has")


def unadapted(module: nn.Module) -> nn.Module:
    """The layer under a module's adapters, or the module itself."""
    return module.base_layer if isinstance(module, AdapterLinear) else module
