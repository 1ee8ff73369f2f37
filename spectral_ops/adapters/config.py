"""The fields and the behaviour that the config of every method shares."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from spectral_ops.adapters.to_peft import to_peft
from spectral_ops.core import checks


@dataclass
class AdapterConfig:
    """Fields every method has, under PEFT's names.

    r: rank or block size. target_modules: names that end a module's path, a regular expression for the whole path, or
    "all-linear" (every linear layer but the output head). exclude_modules: the same, left out. layers_to_transform: the
    layer indices to keep, with layers_pattern the name before the index. bias: which base biases train ("none", "all",
    or those of the adapted layers). modules_to_save: modules trained whole in a copy of their own. task_type: for PEFT.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    task_type: str | None = None

    peft_type: ClassVar[str]
    peft_flags: ClassVar[dict[str, Any]] = {}  # fields of PEFT's config that tell this method from its siblings
    peft_ignored: ClassVar[frozenset[str]] = frozenset()  # fields of PEFT's config that have no effect on this method
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all")

    def __post_init__(self) -> None:
        checks.integer(self._field("r"), self.r, 1, None, "rank or block size")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._check_names(name)
        self.layers_pattern = self.layers_pattern or None
        layers = self.layers_to_transform = None if self.layers_to_transform == [] else self.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or []:
            checks.integer(self._field("layers_to_transform"), layer, 0, None, "the index of a layer")
        if isinstance(self.target_modules, str) and (layers is not None or self.layers_pattern):
            self.wrong("layers_to_transform", layers, "None where target_modules is a string (put the index into it)")
        if self.layers_pattern and layers is None:
            self.wrong("layers_to_transform", None, "layer indices, as layers_pattern is given")
        if self.bias not in self.bias_choices:
            self.wrong("bias", self.bias, f"one of {', '.join(map(repr, self.bias_choices))}")

    def _field(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def wrong(self, name: str, value: Any, wanted: str) -> None:
        """Raise the ValueError of a field."""
        raise ValueError(f"{self._field(name)}: got {value!r}, wanted {wanted}")

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or (isinstance(value, str) and value and name != "modules_to_save"):
            return
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in value):
            self.wrong(name, value, "a list of module names")
        setattr(self, name, list(value))

    @property
    def dropout(self) -> float:
        """Dropout probability on the adapter branch."""
        return 0.0

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves a part of the base weight into the adapter."""
        return False

    @property
    def slow_init(self) -> bool:
        """Whether the initialisation of a whole model is worth a progress line."""
        return self.changes_base

    def for_layer(self, path: str) -> AdapterConfig:
        """This config as it applies to the layer at ``path`` (rank and alpha patterns resolved)."""
        return self

    def for_model(self, sizes: dict[str, tuple[int, int]]) -> AdapterConfig:
        """This config as it applies to a model whose layers at these paths have these sizes [d, k]; ValueError where
        they do not go together."""
        return self

    @property
    def unsaved(self) -> frozenset[str]:
        """Which of a layer's ``tensor_keys`` a file leaves out."""
        return frozenset()

    def for_file(self, plain: bool) -> AdapterConfig:
        """The config to write beside what :meth:`AdapterLinear.file_tensors` gives for the same ``plain``."""
        return self

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        """Whether an adapter_config.json with these fields belongs to this method; the first in METHODS gets it."""
        return fields.get("peft_type") == cls.peft_type and all(
            fields.get(flag) == value if isinstance(value, str) else bool(fields.get(flag)) == bool(value)
            for flag, value in cls.peft_flags.items()
        )

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> AdapterConfig:
        """The config from those fields of an adapter_config.json that this class has."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in names})

    def peft_fields(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"peft_type": self.peft_type, **self.peft_flags, **fields}

    def to_peft(self) -> Any:
        """PEFT's config object of the same adapter, for what takes a ``peft_config``; PEFT then attaches it.

        Raises ImportError without PEFT, ValueError where the installed PEFT lacks the method or what a field asks for.
        """
        return to_peft(self)

    @property
    def base_model_name_or_path(self) -> NoReturn:
        """What PEFT asks a config for first: TypeError, which says where this one belongs."""
        name = type(self).__name__
        raise TypeError(
            f"peft_config: got spectral_ops' {name}, wanted a config of PEFT's: {name}(...).to_peft() makes it;"
            " spectral_ops.attach(model, config) needs none"
        )


def match_pattern(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the end of ``path`` (PEFT's rule), or ``default``."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
