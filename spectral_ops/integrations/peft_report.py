"""What :func:`spectral_ops.accelerate` did to each layer, and what has fallen back to PEFT since."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spectral_ops.functional import NormCache

FUSED, BASE_AGNOSTIC, PEFT = "fused", "fused (base-agnostic)", "PEFT"
UNDECIDED, NEVER = "decided at the first call", "never called"
IDLE = "no adapter was active in its calls: the base layer alone"

logger = logging.getLogger("spectral_ops")
told = False  # whether this process has said that a call fell back
traces = 0  # calls that torch.compile has traced: its graphs count nothing


class LayerState:
    """What an accelerated layer remembers beside its parameters; a copy or pickle starts with no norms or counts."""

    by_key: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
    next_key = 0

    def __init__(
        self, name: str, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
    ):
        self.name, self.strict, self.recompute, self.exact, self.siblings = name, strict, recompute, exact, siblings
        self.alone()
        self.count_anew()
        self.norms: dict[str, NormCache] = {}  # adapter name -> DoRA's column norm
        self.supports: dict[str, Any] = {}  # adapter name -> where its sparse values lie
        self.key = LayerState.next_key
        LayerState.next_key += 1
        LayerState.by_key[self.key] = self

    def count_anew(self) -> None:
        self.plan: tuple | None = None  # what the last call computed with, and the facts under which the next may
        self.calls = 0  # served by the fused operators
        self.idle = 0  # served by the base layer alone: no adapter was active
        self.reasons: dict[str, int] = {}  # why PEFT's forward ran -> how many calls
        self.served: tuple[str, str] | None = None  # the path and the operators of the last fused call's plan
        self.traces = traces

    def norm(self, adapter: str, *arguments) -> torch.Tensor:
        """DoRA's column norm of one adapter, reused within an optimizer step."""
        cache = self.norms.get(adapter)
        if cache is None:
            cache = self.norms[adapter] = NormCache()
        return cache.get(*arguments)

    def alone(self) -> None:
        """Leave the group of layers that read one x, and be watched anew for one, unless that is switched off."""
        self.seat: tuple | None | bool = None if self.siblings else False  # False: not watched
        self.chain: list | None = None  # who got the same x after this layer, when it was last called
        self.watched = 0

    def outlive(self, layer: torch.nn.Module) -> None:
        """A report keeps this state, but not the weights of a plan whose layer is gone."""
        self.layer = weakref.ref(layer, lambda _: self.forget())

    def forget(self) -> None:
        """Start anew: the weights may have changed without a trace."""
        self.norms.clear()
        self.supports.clear()
        self.plan = None

    def note(self, reason: str) -> None:
        """Record one call that PEFT's forward serves; raise instead where accelerate was strict."""
        if self.strict:
            raise RuntimeError(f"{self.name}: {reason}; strict=True forbids PEFT's own forward")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        global told
        if not told:
            told = True
            logger.warning(
                "a call of %s was served by PEFT's own forward: %s. spectral_ops.report(model) lists every such call; "
                "this line comes once per process.", self.name, reason,
            )  # fmt: skip

    def __deepcopy__(self, memo) -> LayerState:
        return LayerState(self.name, self.strict, self.recompute, self.exact, self.siblings)

    def __reduce__(self):
        return LayerState, (self.name, self.strict, self.recompute, self.exact, self.siblings)


@torch.compiler.assume_constant_result
def note_while_tracing(key: int, reason: str) -> bool:
    """The same from inside torch.compile: runs once, while the call is traced, and leaves nothing in the graph."""
    LayerState.by_key[key].note(reason)
    return True


@torch.compiler.assume_constant_result
def note_trace() -> bool:
    """A fused call goes into a graph. It names no layer: one graph may serve many, and a name would be a guard."""
    global traces
    traces += 1
    return True


@dataclass(frozen=True)
class Row:
    """One adapter layer: its name, PEFT's class, its active methods, which path serves it, with what, or why not.

    Before the first call ``path`` is what is planned; from then on it is what ran. ``reason`` also says what a fused
    layer does differently: whose base layer runs alone, or whose weight is rounded. ``calls`` counts calls that the
    fused operators served, also those in which a checkpoint computes again; ``peft_calls`` those that PEFT's forward
    served.
    """

    name: str
    peft_class: str
    method: str
    path: str
    operators: str = ""
    reason: str = ""
    calls: int = 0
    peft_calls: int = 0


@dataclass(frozen=True)
class Fallback:
    """Calls of one layer that PEFT's own forward served, for one reason (calls is 0 for a layer never taken over)."""

    name: str
    reason: str
    calls: int


def observed(row: Row, state: LayerState, called: bool) -> Row:
    """The row as the calls so far have shown it."""
    peft_calls = sum(state.reasons.values())
    if state.calls:
        path, operators = state.served
        reason = row.reason if state.served == (row.path, row.operators) else ""
        row = replace(row, path=path, operators=operators, reason=reason)
    elif peft_calls:
        reason = max(state.reasons, key=state.reasons.__getitem__)
        row = replace(row, path=PEFT, operators="", reason=reason)
    elif state.idle:
        row = replace(row, reason=IDLE)
    elif traces > state.traces:
        row = replace(row, reason="no call outside torch.compile's graphs, whose calls are not counted")
    elif called:
        row = replace(row, path=NEVER, operators="", reason="its parent may read the weights past its forward")
    return replace(row, calls=state.calls, peft_calls=peft_calls)


@dataclass
class Report:
    """Which operators serve each layer, and what has fallen back to PEFT. Everything in it is live: print it again.

    ``rows``, ``counts``, ``fallbacks()`` and ``grouped()`` are for programs.
    """

    planned: list[Row]
    named: dict[str, LayerState] = field(repr=False, default_factory=dict)  # a state's own name may change
    newcomers: Callable[[], list[str]] = field(repr=False, default=list)
    notes: list[str] = field(default_factory=list)  # what was taken over besides layers
    shared: Callable[[], list[str]] = field(repr=False, default=list)  # the projections formed once, so far

    @property
    def states(self) -> list[LayerState]:
        return list(self.named.values())

    @property
    def called(self) -> bool:
        """Whether any accelerated layer has been called since, outside torch.compile's graphs."""
        return any(s.calls or s.idle or s.reasons for s in self.states)

    @property
    def rows(self) -> list[Row]:
        """A row per adapter layer, in the model's order."""
        states, called = self.named, self.called
        return [observed(row, states[row.name], called) if row.name in states else row for row in self.planned]

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers on each path; of the paths that do not serve, only those that some layer is on."""
        paths = [row.path for row in self.rows]
        always = (FUSED, BASE_AGNOSTIC, PEFT)
        return {path: paths.count(path) for path in (*always, UNDECIDED, NEVER) if path in always or path in paths}

    def fallbacks(self) -> list[Fallback]:
        """Every reason for which PEFT's forward has run in an accelerated layer so far, with the number of calls.

        Layers that PEFT added after accelerate are listed too, with 0 calls. A compiled model counts once per trace.
        """
        seen = [Fallback(name, reason, n) for name, s in self.named.items() for reason, n in s.reasons.items()]
        return seen + [Fallback(name, "added after accelerate: call it again", 0) for name in self.newcomers()]

    def grouped(self) -> list[tuple[str, list[str], int]]:
        """The fallbacks by reason: the reason, the layers' names, the calls of all of them."""
        groups: dict[str, tuple[list[str], list[int]]] = {}
        for fallback in self.fallbacks():
            names, calls = groups.setdefault(fallback.reason, ([], []))
            names.append(fallback.name)
            calls.append(fallback.calls)
        return [(reason, names, sum(calls)) for reason, (names, calls) in groups.items()]

    def invalidate(self) -> None:
        """Forget every cached DoRA norm. Needed only after writing a few entries of a large base weight through
        ``.data``: other writes are noticed."""
        for state in self.states:
            state.forget()

    def headline(self) -> str:
        """How many layers are on which path, in one line."""
        counts = self.counts
        parts = [
            f"{counts[FUSED]} layers fused", f"{counts[BASE_AGNOSTIC]} fused over their own base layer",
            f"{counts[PEFT]} left to PEFT", *(f"{counts[p]} {p}" for p in (UNDECIDED, NEVER) if p in counts),
        ]  # fmt: skip
        return ", ".join(parts) + ("" if self.called else " (planned: no call was seen yet)")

    def remarks(self) -> list[str]:
        """A line for each reason why a layer, or some of its calls, did not run fused."""
        paths: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.path not in (FUSED, BASE_AGNOSTIC) or row.reason == IDLE:
                paths.setdefault((row.path, row.reason), []).append(row.name)
        lines = [f"{path}: {len(names)} layers ({shorten(names)}): {reason}" for (path, reason), names in paths.items()]
        for reason, names, calls in self.grouped():
            if (PEFT, reason) not in paths or set(names) != set(paths[PEFT, reason]):
                lines.append(fell_back(reason, names, calls))
        return lines

    def __str__(self) -> str:
        lines = [self.headline()]
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            key = (row.peft_class, row.method, row.path, row.operators, row.reason)
            groups.setdefault(key, []).append(row)
        table = [("layers", "class", "method", "path", "operators", "calls", "which", "reason")]
        for (peft_class, method, path, operators, reason), rows in groups.items():
            calls = str(sum(row.calls for row in rows))
            which = shorten([row.name for row in rows])
            table.append((str(len(rows)), peft_class, method, path, operators, calls, which, reason))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join([*lines, *self.notes, *self.shared(), *(fell_back(*group) for group in self.grouped())])


def fell_back(reason: str, names: list[str], calls: int) -> str:
    return f"fell back: {len(names)} layers ({shorten(names)}): {reason} ({calls} calls)"


def shorten(names: list[str]) -> str:
    """Layer names with block numbers as ``*`` and their common prefix cut off: "0.q_proj", "1.q_proj" -> "*.q_proj"."""
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))
    parts = [p.split(".") for p in patterns]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    if len(parts) == 1:
        parts = [parts[0][-2:]]
    return ", ".join(".".join(p) for p in parts)
