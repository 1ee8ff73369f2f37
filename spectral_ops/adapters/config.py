"""The fields and the behaviour that the config of every method shares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from spectral_ops.adapters.to_peft import to_peft
from spectral_ops.core import checks

TASKS: dict[str | None, tuple[str, ...]] = {  # PEFT's task types, and the heads that train under each
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}


@dataclass
class AdapterConfig:
    """Fields every method has, under PEFT's names.

    r: rank or block size. target_modules: names that end a module's path, a regular expression for the whole path, or
    "all-linear" (every linear layer but the output head); None: what PEFT chooses for this transformers architecture.
    exclude_modules: the same, left out. layers_to_transform: the layer indices to keep, with layers_pattern the name
    before the index. bias: which base biases train ("none", "all", or those of the adapted layers). modules_to_save:
    ends of the paths of modules that are trained whole, in a copy of their own. task_type: one of PEFT's, such as
    "CAUSAL_LM"; "SEQ_CLS" and "TOKEN_CLS" train the modules called classifier or score too, "QUESTION_ANS" qa_outputs.
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
    peft_idle: ClassVar[dict[str, str]] = {  # those that this class lacks and need not have: why they change no number
        "auto_mapping": "names the base model's class",
        "base_model_name_or_path": "names the base model",
        "revision": "names the base model's version",
        "inference_mode": "load_adapter(trainable=) decides that",
        "peft_type": "tells the method",
        "peft_version": "names the writer",
    }
    peft_refused: ClassVar[dict[str, str]] = {}  # those that change the numbers and are not here: what they do
    ours_only: ClassVar[dict[str, str]] = {}  # fields that PEFT's config of this method lacks: what a file says instead
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "all")

    def __post_init__(self) -> None:
        self.check_rank()
        self.layers_pattern = self.layers_pattern or None
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._check_names(name)
        for name in ("layers_pattern", "modules_to_save"):
            entries = getattr(self, name) or []
            check_expressions(self, name, [entries] if isinstance(entries, str) else entries)
        for name in ("target_modules", "exclude_modules"):  # a list of these is compared, not matched
            check_expressions(self, name, [value] if isinstance(value := getattr(self, name), str) else [], "{}")
        layers = self.layers_to_transform
        if isinstance(layers, (list, tuple, set, frozenset, range)):  # a file holds a list
            layers = self.layers_to_transform = [*layers] or None
        for layer in [layers] if isinstance(layers, int) else layers or []:
            checks.integer(self._field("layers_to_transform"), layer, 0, None, "the index of a layer")
        if isinstance(self.target_modules, str) and (layers is not None or self.layers_pattern):
            self.wrong("layers_to_transform", layers, "None where target_modules is a string (put the index into it)")
        if self.layers_pattern and layers is None:
            self.wrong("layers_to_transform", None, "layer indices, as layers_pattern is given")
        self.task_type = getattr(self.task_type, "value", self.task_type)  # PEFT's TaskType
        if self.task_type is not None and self.task_type not in TASKS:
            self.wrong("task_type", self.task_type, f"None or one of {', '.join(map(repr, TASKS))}")
        if self.bias not in self.bias_choices:
            self.wrong("bias", self.bias, f"one of {', '.join(map(repr, self.bias_choices))}")

    def check_rank(self) -> None:
        """Raise TypeError/ValueError where ``r`` is none."""
        checks.integer(self._field("r"), self.r, 1, None, "rank or block size")

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

    def for_task(self) -> AdapterConfig:
        """This config with the head of its task among the modules_to_save, as PEFT has it."""
        saved = self.modules_to_save or []
        heads = [name for name in TASKS.get(self.task_type, ()) if name not in saved]
        return dataclasses.replace(self, modules_to_save=[*saved, *heads]) if heads else self

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
    def known_fields(cls) -> set[str]:
        """The fields of PEFT's config that this class has, or knows to do without."""
        return {f.name for f in dataclasses.fields(cls)} | set(cls.peft_flags) | set(cls.peft_idle)

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
    """The value of the first key that matches the end of ``path``, else of the key that is ``path`` (PEFT's rule)."""
    matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path))
    return next(matching, pattern.get(path, default))


def check_pattern(config: AdapterConfig, name: str) -> None:
    """Raise ValueError where a field is no dict whose keys are regular expressions; None becomes an empty one."""
    setattr(config, name, getattr(config, name) or {})
    value = getattr(config, name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        config.wrong(name, value, "a dict from module names to numbers")
    check_expressions(config, name, value)


def check_expressions(config: AdapterConfig, name: str, entries: Iterable[str], form: str = "({})") -> None:
    """Raise ValueError where an entry of a field, which is matched as a regular expression in ``form``, is none."""
    for entry in entries:
        try:
            re.compile(form.format(entry))
        except (re.error, RecursionError, OverflowError) as error:
            config.wrong(name, entry, f"a regular expression ({error})")


@dataclass
class TokensConfig(AdapterConfig):
    """The fields that PEFT has for LoRA and what descends from it.

    trainable_token_indices: rows of the input embedding to train, or a dict from the ends of module paths to such rows.
    ensure_weight_tying: an embedding among the modules_to_save and the modules tied to it train as one.
    """

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.trainable_token_indices
        for name, rows in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
            self._check_tokens(name, rows)
        if not isinstance(self.ensure_weight_tying, bool):
            self.wrong("ensure_weight_tying", self.ensure_weight_tying, "True or False")

    def _check_tokens(self, name: Any, rows: Any) -> None:
        wanted = "None, a list of different token indices, or a dict from module names to such lists"
        if rows is None and name == "":
            return
        if not isinstance(name, str) or not isinstance(rows, (list, tuple)) or not rows:
            self.wrong("trainable_token_indices", self.trainable_token_indices, wanted)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in rows) or len(set(rows)) != len(rows):
            self.wrong("trainable_token_indices", self.trainable_token_indices, wanted)
