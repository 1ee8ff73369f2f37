"""What :func:`spectral_ops.accelerate` did to each layer, and what has fallen back to PEFT since."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from spectral_ops.functional import NormCache

FUSED, BASE_AGNOSTIC, PEFT = "fused", "fused (base-agnostic)", "PEFT"


class LayerState:
    """What an accelerated layer remembers beside its parameters; a copy or pickle starts with no norms or reasons."""

    by_key: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
    next_key = 0

    def __init__(
        self, name: str, strict: bool = False, recompute: bool = False, exact: bool = False, siblings: bool = True
    ):
        self.name, self.strict, self.recompute, self.exact, self.siblings = name, strict, recompute, exact, siblings
        self.alone()
        self.reasons: dict[str, int] = {}  # why PEFT's forward ran -> how many calls
        self.norms: dict[str, NormCache] = {}  # adapter name -> DoRA's column norm
        self.plan: tuple | None = None  # what the last call computed with, and the facts under which the next may
        self.key = LayerState.next_key
        LayerState.next_key += 1
        LayerState.by_key[self.key] = self

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

    def forget(self) -> None:
        """Start anew: the weights may have changed without a trace."""
        self.norms.clear()
        self.plan = None

    def note(self, reason: str) -> None:
        """Record one call that PEFT's forward serves; raise instead where accelerate was strict."""
        if self.strict:
            raise RuntimeError(f"{self.name}: {reason}; strict=True forbids PEFT's own forward")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def __deepcopy__(self, memo) -> LayerState:
        return LayerState(self.name, self.strict, self.recompute, self.exact, self.siblings)

    def __reduce__(self):
        return LayerState, (self.name, self.strict, self.recompute, self.exact, self.siblings)


@torch.compiler.assume_constant_result
def note_while_tracing(key: int, reason: str) -> bool:
    """The same from inside torch.compile: runs once, while the call is traced, and leaves nothing in the graph."""
    LayerState.by_key[key].note(reason)
    return True


@dataclass(frozen=True)
class Row:
    """One adapter layer: its name, PEFT's class, its active methods, which path serves it, with what, or why not.

    ``reason`` also says what a fused layer does differently: whose base layer runs alone, or whose weight is rounded.
    """

    name: str
    peft_class: str
    method: str
    path: str
    operators: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Fallback:
    """Calls of one layer that PEFT's own forward served, for one reason (calls is 0 for a layer never taken over)."""

    name: str
    reason: str
    calls: int


@dataclass
class Report:
    """What accelerate did, layer by layer. Print it; ``rows`` and ``counts`` for programs; ``fallbacks()`` is live."""

    rows: list[Row]
    states: list[LayerState] = field(repr=False, default_factory=list)
    newcomers: Callable[[], list[str]] = field(repr=False, default=list)
    notes: list[str] = field(default_factory=list)  # what was taken over besides layers
    shared: Callable[[], list[str]] = field(repr=False, default=list)  # the projections formed once, so far

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers on each path."""
        return {path: sum(row.path == path for row in self.rows) for path in (FUSED, BASE_AGNOSTIC, PEFT)}

    def fallbacks(self) -> list[Fallback]:
        """Every reason for which PEFT's forward has run in an accelerated layer so far, with the number of calls.

        Layers that PEFT added after accelerate are listed too, with 0 calls. A compiled model counts once per trace.
        """
        seen = [Fallback(s.name, reason, calls) for s in self.states for reason, calls in s.reasons.items()]
        return seen + [Fallback(name, "added after accelerate: call it again", 0) for name in self.newcomers()]

    def invalidate(self) -> None:
        """Forget every cached DoRA norm: call it after writing to a frozen base weight through ``.data``."""
        for state in self.states:
            state.forget()

    def __str__(self) -> str:
        counts = self.counts
        lines = [
            f"{counts[FUSED]} layers fused, {counts[BASE_AGNOSTIC]} fused over their own base layer, "
            f"{counts[PEFT]} left to PEFT"
        ]
        groups: dict[tuple, list[str]] = {}
        for row in self.rows:
            key = (row.peft_class, row.method, row.path, row.operators, row.reason)
            groups.setdefault(key, []).append(row.name)
        table = [("layers", "class", "method", "path", "operators", "which", "reason")]
        for (peft_class, method, path, operators, reason), names in groups.items():
            table.append((str(len(names)), peft_class, method, path, operators, shorten(names), reason))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines += [*self.notes, *self.shared()]
        for fallback in self.fallbacks():
            lines.append(f"fell back: {fallback.name}: {fallback.reason} ({fallback.calls} calls)")
        return "\n".join(lines)


def shorten(names: list[str]) -> str:
    """Layer names with block numbers as ``*`` and their common prefix cut off: "0.q_proj", "1.q_proj" -> "*.q_proj"."""
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))
    parts = [p.split(".") for p in patterns]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    if len(parts) == 1:
        parts = [parts[0][-2:]]
    return ", ".join(".".join(p) for p in parts)
