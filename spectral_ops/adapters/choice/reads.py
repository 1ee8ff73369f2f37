"""Which weights of its child modules a class computes with itself, by its source."""

from __future__ import annotations

import ast
import inspect
import linecache
import re
import textwrap
from collections.abc import Collection, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

Chain = tuple[str, ...]  # self.layers[i].proj is ("layers", "*", "proj")
Guards = tuple[tuple[ast.expr, bool], ...]  # conditions on the way to a place, and what they must be

_NOT_VALUES = frozenset(
    "dtype device shape ndim requires_grad is_meta is_cuda layout itemsize size dim numel stride element_size "
    "is_floating_point data_ptr".split()
)
_ASKING = frozenset("isinstance hasattr getattr type id len".split())
# what a condition on a module's settings is made of
_STATED = ast.Name | ast.Call | ast.Attribute | ast.Compare | ast.Constant | ast.cmpop | ast.expr_context
_SETTING_UP = re.compile(
    r"^_*(init|reset_|tie_|resize_|prune_|load_|convert_|from_)|repr(__)?$|(get|set)state__$|state_dict$"
)


class Read(NamedTuple):
    """A function that computes with the weight of ``chain``. certain: in every forward of the module."""

    chain: Chain
    function: str
    certain: bool


class Found(NamedTuple):
    reads: tuple[Read, ...]
    used: frozenset[Chain]  # modules that are called, passed on or bound to a name

    def of(self, path: str) -> tuple[Read, ...]:
        """The reads of the module at ``path``."""
        return tuple(read for read in self.reads if _matches(read.chain, path))

    def uses(self, path: str) -> bool:
        """Whether the module at ``path`` is used otherwise too."""
        return any(_matches(chain, path) for chain in self.used)


_NOTHING = Found((), frozenset())


class Reader:
    """What the methods of modules read, but for those that only set a module up and those in ``skip``.

    Remembers each class for as long as it lives: a class whose methods are replaced later needs another Reader.
    """

    def __init__(self, skip: Collection[FunctionType] = ()) -> None:
        self.skip = skip
        self.kinds: dict[type, list[FunctionType]] = {}  # no functions of a class that reads nothing

    def found(self, module: nn.Module) -> Found:
        """What ``module`` reads. A branch counts unless the module's settings rule it out, as in
        ``if self.config.pretraining_tp > 1``."""
        kind = type(module)
        if kind not in self.kinds:
            functions = [function for function in _functions(kind) if function not in self.skip]
            self.kinds[kind] = functions if any(map(_reads, functions)) else []
        functions = self.kinds[kind]
        own = _plain(module.__dict__.get("forward"))  # a forward that was put on the instance
        if own is not None and _reads(own):
            functions = [own, *_functions(kind)]
        reads: dict[Read, None] = {}
        for function in filter(_reads, functions):
            parsed = _parsed(function)
            for chain, guards, straight in parsed.reads:
                if (state := parsed.state(guards, module)) is not False:
                    reads[Read(chain, function.__qualname__, straight and state is True)] = None
        if not reads:
            return _NOTHING
        used: set[Chain] = set()
        for parsed in map(_parsed, functions):
            used.update(chain for chain, guards, _ in parsed.used if parsed.state(guards, module) is not False)
        return Found(tuple(reads), frozenset(used))


def _reads(function: FunctionType) -> bool:
    return "weight" in _names(function.__code__) and bool(_parsed(function).reads)


def _matches(chain: Chain, path: str) -> bool:
    names = path.split(".")
    return len(chain) == len(names) and all(a in ("*", b) for a, b in zip(chain, names, strict=True))


def _functions(module_type: type) -> Iterator[FunctionType]:
    kinds = [kind for kind in module_type.__mro__ if kind not in (nn.Module, object)]
    for name in dict.fromkeys(name for kind in kinds for name in vars(kind)):
        if _SETTING_UP.search(name):
            continue
        for kind in kinds:
            if name in vars(kind):
                function = _plain(vars(kind)[name])
                if function is not None:
                    yield function
                if function is None or "super" not in _names(function.__code__):
                    break  # it hides those of the classes it inherits from


def _plain(value: Any) -> FunctionType | None:
    for attribute in ("__func__", "fget", "func"):  # a (class) method, a property, a partial or cached property
        value = getattr(value, attribute, None) or value
    value = inspect.unwrap(value) if callable(value) else None
    return value if isinstance(value, FunctionType) and value.__code__.co_argcount else None


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


@lru_cache(maxsize=4096)
def _parsed(function: FunctionType) -> _Function:
    code = function.__code__  # inspect.getsource would go through all modules that are imported
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    try:
        body = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))).body[0]
    except (SyntaxError, ValueError, IndexError):  # no source, or a piece of a line
        body = None
    return _Function(body if isinstance(body, ast.FunctionDef) else None, function)


class _Function:
    """What one function says: ``reads`` and ``used``, as (chain, guards, whether nothing else can lead past it)."""

    def __init__(self, body: ast.FunctionDef | None, function: FunctionType) -> None:
        self.body, self.self_name = body, function.__code__.co_varnames[0]
        self.is_forward = function.__name__ == "forward"
        self.reads: list[tuple[Chain, Guards, bool]] = []
        self.used: list[tuple[Chain, Guards, bool]] = []
        if body is None:
            return
        self.parents = {child: node for node in ast.walk(body) for child in ast.iter_child_nodes(node)}
        self.bound: dict[str, set[Chain]] = {self.self_name: {()}}
        for _ in range(2):  # a name may be bound to the child of another name
            for node in ast.walk(body):
                self._bind(node)
        for node in ast.walk(body):
            if not isinstance(getattr(node, "ctx", None), ast.Load):
                continue
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                if self._is_value(node):
                    self.reads += [(chain, *self._way(node)) for chain in sorted(self._chains(node.value)) if chain]
            elif not isinstance(self.parents.get(node), ast.Attribute):
                self.used += [(chain, *self._way(node)) for chain in self._chains(node)]

    def _bind(self, node: ast.AST) -> None:
        pairs: list[tuple[ast.expr, set[Chain]]] = []
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs.append((node.targets[0], self._chains(node.value)))
        elif isinstance(node, ast.For | ast.comprehension):
            target, source = node.target, node.iter
            name = source.func.id if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) else None
            if name == "enumerate" and isinstance(target, ast.Tuple):
                target, source = target.elts[-1], source.args[0]
            targets, sources = [target], [source]
            if name == "zip" and isinstance(target, ast.Tuple):
                targets, sources = target.elts, source.args
            for one, its in zip(targets, sources, strict=False):
                pairs.append((one, {(*chain, "*") for chain in self._chains(its)}))
        for target, chains in pairs:
            if isinstance(target, ast.Name) and chains:
                self.bound.setdefault(target.id, set()).update(chains)

    def _chains(self, node: ast.AST) -> set[Chain]:
        """The children of self that an expression may be."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {(*chain, node.attr) for chain in self._chains(node.value)}
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
            return {(*chain, str(index)) for chain in self._chains(node.value)}
        return set()

    def _is_value(self, node: ast.AST) -> bool:
        """Whether what the weight holds is used, rather than what it is."""
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            return self._is_value(parent) if parent.attr == "data" else parent.attr not in _NOT_VALUES
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and node is not parent.func:
            return parent.func.id not in _ASKING
        if isinstance(parent, ast.Compare):
            return not all(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1:
            target = parent.targets[0]
            if isinstance(target, ast.Attribute):
                return target.attr != "weight"  # a weight tied to another
            if isinstance(target, ast.Name):
                names = [n for n in ast.walk(self.body) if isinstance(n, ast.Name) and n.id == target.id]
                return any(self._is_value(n) for n in names if isinstance(n.ctx, ast.Load))
        return True

    def _way(self, node: ast.AST) -> tuple[Guards, bool]:
        """The conditions under which a call gets to a node, and whether it gets there by them alone."""
        guards: list[tuple[ast.expr, bool]] = []
        line, straight = node.lineno, self.is_forward
        while node is not self.body:
            child, node = node, self.parents[node]
            if isinstance(node, ast.If | ast.IfExp) and child is not node.test:
                body = node.body if isinstance(node.body, list) else [node.body]
                guards.append((node.test, child in body))
            elif isinstance(node, ast.Try | ast.While | ast.BoolOp | ast.Lambda | ast.Match):
                straight = False
            elif isinstance(node, ast.FunctionDef) and node is not self.body:
                straight = False
        leaving = (n.lineno for n in ast.walk(self.body) if isinstance(n, ast.Return | ast.Raise))
        return tuple(guards), straight and all(line <= other for other in leaving)

    def state(self, guards: Guards, module: nn.Module) -> bool | None:
        """Whether all guards hold for a module; None where that depends on more than its settings."""
        states = [(self._holds(test, module), wanted) for test, wanted in guards]
        if any(state not in (None, wanted) for state, wanted in states):
            return False
        return None if any(state is None for state, _ in states) else True

    def _holds(self, test: ast.expr, module: nn.Module) -> bool | None:
        if isinstance(test, ast.BoolOp):
            states = [self._holds(value, module) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            return decisive if decisive in states else None if None in states else not decisive
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            state = self._holds(test.operand, module)
            return None if state is None else not state
        for node in ast.walk(test):
            local = isinstance(node, ast.Name) and node.id not in (self.self_name, "hasattr")
            varying = isinstance(node, ast.Attribute) and node.attr == "training"
            calls = isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == "hasattr")
            if local or varying or calls or not isinstance(node, _STATED):
                return None
        try:
            names = {self.self_name: module, "hasattr": hasattr}
            return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), names))
        except Exception:
            return None
