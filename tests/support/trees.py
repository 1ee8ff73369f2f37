"""Random module trees whose names invite mistakes, and random configs that choose in them: strategies of hypothesis."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from torch import nn

NAMES = [
    "q", "aq", "qa", "q_proj", "v_proj", "proj", "roj", "k", "kq", "0", "1", "10", "01", "h", "layers", "block", "head",
    "a+b", "q*", "x[0]", "(q)", "w-z", "Q", r"\d", "q|k", "^q$", "gate", "c_attn", "query_key_value",
]  # fmt: skip
REGEXES = [
    ".*", ".*q", ".*[.]q", r".*\.(q|k|aq)", r".*\.[01]\..*", r"h\..*", "q", "q|k", "(?i).*Q.*", r".*\.\d+\.q.*",
    r"^.*proj$", r".*(?<!a)q", r".*\.0\.[^.]*", "All-Linear", "", "[", "*q", "nothing", ".*[.][^.]*", "[^.]*",
    ".*[|].*",
]  # fmt: skip
CONTAINERS = ["h", "layers", "block", "model", "attn", "mlp", "experts", "1", "q", "x[0]"]
MODEL_TYPES = [None, "llama", "gpt2", "bloom", "t5", "gemma4", "unheard_of"]
SIZE = 4


class Config:
    """The part of a transformers config that the choice of modules reads."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type}


@dataclass
class Tree:
    """A module tree as data: children are trees, "linear", "norm", or "shared", one linear layer everywhere."""

    children: dict[str, Any]
    model_type: str | None = None
    paths: list[str] = field(init=False)
    linear: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.paths, self.linear = [], []
        self._walk(self.children, "")

    def _walk(self, children: dict[str, Any], prefix: str) -> None:
        for name, child in children.items():
            self.paths.append(prefix + name)
            if isinstance(child, dict):
                self._walk(child, f"{prefix}{name}.")
            elif child != "norm":
                self.linear.append(prefix + name)

    def at(self, path: str) -> Any:
        child = self.children
        for name in path.split("."):
            child = child[name]
        return child

    def build(self) -> nn.Module:
        shared = nn.Linear(SIZE, SIZE)
        model = self._module(self.children, shared)
        if self.model_type is not None:
            model.config = Config(self.model_type)
        return model

    def _module(self, child: Any, shared: nn.Linear) -> nn.Module:
        if isinstance(child, dict):
            numbered = list(child) == [str(i) for i in range(len(child))]
            module = nn.ModuleList() if numbered else nn.Module()
            for name, inner in child.items():
                module.add_module(name, self._module(inner, shared))
            return module
        made = {"linear": lambda: nn.Linear(SIZE, SIZE), "norm": lambda: nn.LayerNorm(SIZE), "shared": lambda: shared}
        return made[child]()


leaves = st.sampled_from(["linear"] * 11 + ["norm"])
names, outer = st.sampled_from(NAMES), st.sampled_from(CONTAINERS)


def inner(children):
    block = st.dictionaries(names, leaves, min_size=1, max_size=4) | st.dictionaries(outer, children, max_size=2)
    return block | st.tuples(block, st.integers(1, 3)).map(lambda pair: {str(i): pair[0] for i in range(pair[1])})


nodes = st.recursive(st.dictionaries(names, leaves, min_size=1, max_size=4), inner, max_leaves=3)


@st.composite
def trees(draw, shared: bool = False) -> Tree:
    children = draw(st.dictionaries(outer, nodes, min_size=1, max_size=2))
    children |= draw(st.dictionaries(names, leaves, min_size=1, max_size=3))
    stack = draw(st.dictionaries(names, leaves, min_size=1, max_size=4))
    children[draw(st.sampled_from(["h", "layers", "block"]))] = {str(i): stack for i in range(draw(st.integers(1, 3)))}
    if shared:
        for name in draw(st.lists(names, min_size=2, max_size=3, unique=True)):
            children[name] = "shared"
    return Tree(children, draw(st.sampled_from(MODEL_TYPES)))


def ends(tree: Tree, loose: bool = False):
    """Ends of the paths of linear layers, now and then of any module's: whole names, or (loose) cut anywhere."""

    def whole(path: str):
        parts = path.split(".")
        return st.integers(1, len(parts)).map(lambda n: ".".join(parts[-n:]))

    def cut(path: str):
        return st.integers(1, len(path)).map(lambda n: path[-n:].lstrip(".") or "q")

    linear = tree.linear or tree.paths
    path = st.integers(0, 11).flatmap(lambda n: st.sampled_from(linear if n else tree.paths))
    return path.flatmap(whole) | path.flatmap(cut) if loose else path.flatmap(whole)


def lists(tree: Tree, loose: bool = False):
    return st.lists(st.integers(0, 5).flatmap(lambda n: ends(tree, loose) if n else names), min_size=1, max_size=3)


def regexes(tree: Tree):
    def pattern(end: str):
        return st.sampled_from([rf".*{re.escape(end)}", rf"(.*\.)?{end}", rf".*\.{re.escape(end)}", rf".*{end}.*"])

    return st.integers(0, 2).flatmap(lambda n: ends(tree, True).flatmap(pattern) if n else st.sampled_from(REGEXES))


def maybe(strategy, often: int = 3):
    return st.integers(0, often).flatmap(lambda n: strategy if n == 0 else st.none())


@st.composite
def choices(draw, tree: Tree) -> dict[str, Any]:
    """Fields of a config for ``tree``."""
    loose = draw(st.booleans())
    everything = st.just("all-linear") | st.none() | st.just(tree.linear)
    fields = {
        "target_modules": draw(lists(tree, loose) | lists(tree) | regexes(tree) | everything),
        "exclude_modules": draw(maybe(lists(tree, loose) | regexes(tree))),
        "modules_to_save": draw(maybe(lists(tree, loose))),
        "rank_pattern": draw(maybe(st.dictionaries(ends(tree, loose) | regexes(tree), st.integers(1, 3), max_size=3))),
        "alpha_pattern": draw(maybe(st.dictionaries(ends(tree) | regexes(tree), st.integers(1, 9), max_size=3))),
    }
    if not isinstance(fields["target_modules"], str) or not draw(st.integers(0, 9)):
        fields["layers_to_transform"] = draw(maybe(st.integers(0, 2) | st.lists(st.integers(0, 2), max_size=2), 2))
        pattern = st.sampled_from(["h", "layers", "block", "layer", "(h|layers)", r"\w+", "", "["])
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = draw(maybe(pattern | st.lists(pattern, max_size=2), 1))
    return {name: value for name, value in fields.items() if value is not None}
