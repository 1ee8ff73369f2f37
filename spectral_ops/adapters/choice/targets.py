"""Which modules of a model a config chooses, by PEFT's rules: to be adapted, or trained beside the adapter."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from spectral_ops.adapters.base import AdapterLinear, unadapted
from spectral_ops.adapters.choice import embeddings, experts, parents
from spectral_ops.adapters.choice.architectures import default_targets, model_type
from spectral_ops.adapters.config import TASKS, AdapterConfig
from spectral_ops.adapters.frozen import is_linear
from spectral_ops.adapters.trained_copy import TrainedCopy
from spectral_ops.adapters.tree import walk

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class Choice:
    """What a config chooses in a model; ``config`` is the one to attach: with its task's head and its targets filled
    in."""

    config: AdapterConfig
    layers: dict[str, nn.Module]  # adapted, by first path
    copies: dict[str, nn.Module]  # trained whole
    tied: dict[str, str] = field(default_factory=dict)  # among copies: whose copy's weight each of these uses
    tokens: dict[str, list[int]] = field(default_factory=dict)  # embeddings, and the rows of theirs that train
    tied_tokens: dict[str, str] = field(default_factory=dict)  # modules that use the rows of one in ``tokens``
    skipped: list[str] = field(default_factory=list)  # chosen layers on which an adapter would have no effect


def names_path(entries: Iterable[str], path: str) -> bool:
    """Whether a path is one of ``entries`` or ends with one of them."""
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def _layer_index(config: AdapterConfig, path: str) -> int | None:
    """The index of the layer a path belongs to: the first number in it, or the one after ``layers_pattern``."""
    if not config.layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        return int(match["idx"]) if match else None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path):
            return int(match["idx"])
    return None


def matches(config: AdapterConfig, path: str) -> bool:
    """PEFT's rule whether target_modules (not "all-linear"), exclude_modules and layers_to_transform choose a path."""
    exclude = config.exclude_modules
    if isinstance(exclude, str) and re.fullmatch(exclude, path):
        return False
    if isinstance(exclude, list) and names_path(exclude, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or []):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, path) is not None
    if path in config.target_modules:
        return True
    if not names_path(config.target_modules, path):
        return False
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted
    return not wanted or _layer_index(config, path) in wanted


def is_all_linear(names: list[str] | str | None) -> bool:
    """Whether target_modules is the word for every linear layer."""
    return isinstance(names, str) and names.lower() == "all-linear"


def _adaptable(module: nn.Module) -> bool:
    return is_linear(unadapted(module))


def _head(model: nn.Module, config: AdapterConfig) -> nn.Module | None:
    """The output layer of a transformers model, which "all-linear" leaves out."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head.original_module if isinstance(head, TrainedCopy) else head


def targets(model: nn.Module, config: AdapterConfig, empty: bool = False) -> dict[str, nn.Module]:
    """The modules that target_modules chooses, by their first path; ValueError where there is none (unless ``empty``),
    or one cannot be adapted."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for path, module in walk(model):
        first.setdefault(id(module), (path, module))
    modules = dict(first.values())
    linear = {path: module for path, module in modules.items() if path and _adaptable(module)}
    names, everything = config.target_modules, is_all_linear(config.target_modules)
    if names is None:
        raise ValueError(f"target_modules: got None for {_unknown(model)}, wanted {_wanted(linear)}")
    stacked = experts.old_names(model, config.peft_type)
    if everything:
        head = _head(model, config)
        paths = [path for path, module in linear.items() if module is not head]
        if stacked:
            paths = _without_experts(model, paths, stacked)
        config = dataclasses.replace(config, target_modules=paths)
    found = {path: module for path, module in modules.items() if path and matches(config, path)}
    for path, module in found.items():
        if not _adaptable(module):
            raise ValueError(
                f"target_modules: got {names!r}, which matches {path!r} ({type(module).__name__}),"
                " wanted linear layers only (narrow it, or name that module in exclude_modules)"
            )
    if stacked and not everything:
        _refuse_experts(model, config, found, stacked)
    if not found and not empty:
        narrowed = "" if config.layers_to_transform is None else f" in layers {config.layers_to_transform}"
        raise ValueError(f"target_modules: got {names!r}, which matches nothing{narrowed}; wanted {_wanted(linear)}")
    return found


def _without_experts(model: nn.Module, paths: list[str], stacked: frozenset[str]) -> list[str]:
    left = [path for path in paths if path.rpartition(".")[2] in stacked]
    warnings.warn(
        f'target_modules: "all-linear" means the experts too in PEFT ({", ".join(experts.stacks(model)[:2])}, …), which'
        " attach leaves frozen (target_parameters adapts them)"
        + (f", and not {', '.join(left[:3])}, which it leaves out as well" if left else ""),
        stacklevel=5,
    )
    return [path for path in paths if path not in left]


def _refuse_experts(model: nn.Module, config: AdapterConfig, found, stacked: frozenset[str]) -> None:
    names = config.target_modules
    listed = [n for n in names if n.rpartition(".")[2] in stacked] if isinstance(names, list) else []
    wrong = listed or [path for path in found if path.rpartition(".")[2] in stacked]
    if wrong:
        raise ValueError(
            f"target_modules: got {names!r}, where {wrong[0]!r} means the experts of a {model_type(model)}"
            f" ({', '.join(experts.stacks(model)[:2])}, …) to PEFT, wanted other layers, and those in target_parameters"
        )


def _unknown(model: nn.Module) -> str:
    kind = model_type(model)
    return "a model without config.model_type" if kind is None else f"the unknown architecture {kind!r}"


def _wanted(linear: dict[str, nn.Module]) -> str:
    if not linear:
        return "a model with linear layers (this one has none)"
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in linear))
    more = ", …" if len(ends) > 12 else ""
    return (
        f'"all-linear", a regular expression, or a list of names such as {ends[:12]}{more}'
        f" ({len(linear)} linear layers, the first is {next(iter(linear))!r})"
    )


def modules_to_save(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` trains whole, under every path: PEFT goes by the end of the path, dots or not."""
    names, found = tuple(config.modules_to_save or ()), {}
    for path, module in walk(model):
        if not path or not names or not path.endswith(names):
            continue
        if any(path.startswith(f"{parent}.") for parent in found):
            continue  # it is copied with its parent
        if any(isinstance(m, AdapterLinear) for m in module.modules()):
            raise ValueError(
                f"modules_to_save: got {list(names)!r}, wanted modules without adapters ({path!r} has some)"
            )
        if isinstance(module, CONTAINERS):
            kind = type(module).__name__
            raise ValueError(
                f"modules_to_save: got {list(names)!r}, wanted modules that are called ({path!r} is a {kind})"
            )
        found[path] = module
    return found


def choose(model: nn.Module, config: AdapterConfig, loading: bool = False) -> Choice:
    """Everything that ``config`` chooses in ``model``; ValueError where that cannot be.

    loading: leave out what a file names without effect, with a warning, where attaching would be an error.
    """
    config = experts.converted(model, config.for_task())
    if config.target_modules is None:
        default = default_targets(model, config.peft_type)
        if default is None and getattr(config, "target_parameters", None):
            default = []
        config = dataclasses.replace(config, target_modules=default)
    tied: dict[str, str] = {}
    if getattr(config, "ensure_weight_tying", False):
        config, tied = _tie(model, config)
    stacked = experts.experts(model, config)
    found = targets(model, config, empty=bool(stacked))
    layers = parents.check(model, found, explicit=not (loading or is_all_linear(config.target_modules)))
    skipped = [path for path in found if path not in layers]
    layers = layers | stacked
    copies = modules_to_save(model, config)
    copies |= {path: model.get_submodule(path) for path in tied}
    for path in copies:
        inside = [name for name in layers if name == path or name.startswith(f"{path}.")]
        if inside:
            raise ValueError(
                f"modules_to_save: got {config.modules_to_save!r}, where {path!r} is to be trained whole, and"
                f" target_modules adapts {inside[0]!r}, wanted one or the other"
            )
    tokens, tied_tokens = _tokens(model, config)
    for path in (*tokens, *tied_tokens):
        if path in layers or path in copies:
            raise ValueError(
                f"trainable_token_indices: got {config.trainable_token_indices!r} for {path!r}, which target_modules or"
                " modules_to_save names too, wanted one or the other"
            )
    return Choice(config, layers, copies, tied, tokens, tied_tokens, skipped)


def _tie(model: nn.Module, config: AdapterConfig) -> tuple[AdapterConfig, dict[str, str]]:
    """The config that trains the input embedding whole, and the modules that are to use that copy's weight."""
    tied, source = embeddings.tied_to_input(model), embeddings.input_embedding(model)
    if not tied or not embeddings.named(config.modules_to_save):
        if tied and embeddings.named(config.target_modules, targets=True):
            config.wrong("ensure_weight_tying", True, "False where target_modules adapts an embedding")
        return config, {}
    saved = [name for name in config.modules_to_save if not any(names_path([name], path) for path in tied)]
    saved = saved if any(source.endswith(name) for name in saved) else [*saved, source]
    return dataclasses.replace(config, modules_to_save=saved), dict.fromkeys(tied, source)


def _tokens(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, list[int]], dict[str, str]]:
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return {}, {}
    source = embeddings.input_embedding(model)
    if not isinstance(wanted, dict):
        wanted = {source or "embed_tokens": wanted}
    tied = embeddings.tied_to_input(model)
    rows: dict[str, list[int]] = {}
    for name, indices in wanted.items():
        paths = [path for path, _ in walk(model) if path and path.endswith(name)]
        if not paths:
            config.wrong("trainable_token_indices", wanted, f"names of modules ({name!r} matches nothing)")
        rows |= dict.fromkeys(paths, list(indices))
    if source not in rows:
        return rows, {}
    differing = [path for path in tied if path in rows and rows[path] != rows[source]]
    if differing and config.ensure_weight_tying:
        config.wrong(
            "trainable_token_indices", wanted, f"the same rows for {source!r} and {differing[0]!r}, tied to it"
        )
    tied = [] if differing else tied
    return {path: indices for path, indices in rows.items() if path not in tied}, dict.fromkeys(tied, source)


def unmatched(model: nn.Module, config: AdapterConfig) -> dict[str, list[str]]:
    """Names in the config that match nothing in the model, by field; a task's own heads are not missed."""
    paths = [path for path, _ in walk(model)]
    heads = TASKS.get(config.task_type, ())
    listed = config.target_modules if isinstance(config.target_modules, list) else []
    unused = {
        "target_modules": [name for name in listed if not any(names_path([name], path) for path in paths)],
        "modules_to_save": [
            name
            for name in config.modules_to_save or []
            if name not in heads and not any(path.endswith(name) for path in paths)
        ],
    }
    parameters = getattr(config, "target_parameters", None) or []
    known = [f"{path}.{name}" for path, module in walk(model) for name in unadapted(module)._parameters]
    unused["target_parameters"] = [name for name in parameters if not any(names_path([name], path) for path in known)]
    return {name: missing for name, missing in unused.items() if missing}
