"""Adapter layers that are found to read one x: its projection is formed once for them all.

Found by watching, never by name: layers called one after the other with the same x, the object, are proposed as a
group, and at its first member's next call the group is seated. From then on that member projects x for all; another
takes its slice only if everything the slice was made of is what it would itself compute with, and works alone
otherwise. Alone, too, under autocast, dropout, hooks, dispatch modes, stream capture and torch.compile.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch

from spectral_ops import _library
from spectral_ops.core import steps
from spectral_ops.functional import lowrank, siblings

PATIENCE = 8  # calls without company after which a layer is no longer watched
MISSES = 3  # projections in a row that not everybody took, after which a group is dissolved
# Elements of x from which its second read costs more than the host's time for a shared projection. On a CPU, whose
# caches hold x, nothing was gained (docs/PERFORMANCE.md); on a GPU it is not measured yet.
LEAST = {"cuda": 1 << 24}
_watch = threading.local()  # .last: the chain of layers that the thread's last call belongs to, and its x


class Group:
    """Members by weak reference, the leader first, and the projection that waits for them."""

    def __init__(self, members: list[weakref.ref]):
        self.members, self.misses = members, 0
        self.pending: Pending | None = None
        steps.watch()

    def dissolve(self) -> None:
        self.pending = None
        for reference in self.members:
            if (state := reference()) is not None:
                state.seat = False

    def names(self) -> list[str]:
        states = [reference() for reference in self.members]
        return [state.name for state in states if state is not None]


class Seat(NamedTuple):
    group: Group
    place: int


class Pending:
    """What a leader has projected, and everything it depends on."""

    __slots__ = ("x", "facts", "rest", "box", "recompute")

    def __init__(self, x, facts, rest, box, recompute):
        self.x, self.facts, self.rest, self.box, self.recompute = x, facts, rest, box, recompute


def facts_of(x: torch.Tensor) -> tuple:
    """What must not change between the projection and its use, beside A and the identity of x."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return x._version, x.data_ptr(), torch.is_grad_enabled(), threading.get_ident(), steps.current(), stream


def stamp(A: torch.Tensor) -> tuple:
    return A._version, A.data_ptr(), A.requires_grad


def worth(x: torch.Tensor) -> bool:
    least = LEAST.get(x.device.type)
    return least is not None and x.numel() >= least


def unusual(x: torch.Tensor) -> bool:
    """Whether the call is made where a shared projection could be seen or outlive its time."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or x.is_inference()
        or _library.forced_backend is not None
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class Member:
    """The call of a planned layer without dropout: one operator over one weight, with or without company."""

    __slots__ = ("weight", "A", "B", "bias", "core", "scale")

    def __init__(self, weight, A, B, bias, core, scale):
        self.weight, self.A, self.B, self.bias, self.core, self.scale = weight, A, B, bias, core, scale

    def __call__(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        state = layer._spectral_ops
        seat = state.seat
        if seat is not False and worth(x) and not unusual(x):
            if seat is None:
                seat = watch(state, x)
            if seat is not None:
                found = lead(seat.group, self, x) if seat.place == 0 else follow(seat, self, x)
                if found is not None:
                    h, box = found
                    return siblings.linear(x, self.weight, h, self.A, self.B, self.bias, self.core, self.scale, box)
        return lowrank.linear(x, self.weight, self.A, self.B, self.bias, self.core, None, self.scale, 0.0)


def watch(state, x: torch.Tensor) -> Seat | None:
    """Note who got x; seat the group that the layer led when it was last called."""
    if torch._C._current_graph_task_id() != -1:  # a checkpoint's recompute shows no more than its forward did
        return None
    chain = state.chain
    if chain is not None and len(chain) > 1:
        state.chain = None
        states = [reference() for reference in chain]
        if all(s is not None and s.siblings and s.seat is None for s in states):
            group = Group(chain)
            for place, member in enumerate(states):
                member.seat, member.chain = Seat(group, place), None
            return state.seat
    last = getattr(_watch, "last", None)
    me = weakref.ref(state)
    if last is not None and last[0]() is x and last[1] == x._version and me not in last[2]:
        last[2].append(me)
        return None
    state.chain = [me]
    _watch.last = weakref.ref(x), x._version, state.chain
    state.watched += 1
    if state.watched > PATIENCE:
        state.seat = False
    return None


def lead(group: Group, own: Member, x: torch.Tensor):
    """The projection of x for the whole group: the leader's own slice, the others' left to be taken."""
    left, group.pending = group.pending, None
    recompute = torch._C._current_graph_task_id() != -1
    if left is not None and left.rest and not left.recompute and not recompute:
        group.misses += 1
        if group.misses >= MISSES:
            group.dissolve()
            return None
    elif left is not None and not left.rest:
        group.misses = 0
    As = [own.A]
    for reference in group.members[1:]:
        state = reference()
        plan = None if state is None else state.plan
        member = plan[1] if plan is not None and type(plan[1]) is Member else None
        if member is None or not fits(member.A, own.A):
            return None
        As.append(member.A)
    box: dict = {}
    hs = siblings.project(x, As, box)
    rest = {place: (As[place], stamp(As[place]), hs[place]) for place in range(1, len(As))}
    group.pending = Pending(weakref.ref(x), facts_of(x), rest, box, recompute)
    return hs[0], box


def fits(A: torch.Tensor, first: torch.Tensor) -> bool:
    return A.dtype is first.dtype and A.device == first.device and A.shape[1] == first.shape[1] and not A.is_inference()


def follow(seat: Seat, own: Member, x: torch.Tensor):
    """The slice that the leader left for this layer, if it is what the layer would compute."""
    pending = seat.group.pending
    if pending is None or pending.x() is not x or pending.facts != facts_of(x):
        return None
    entry = pending.rest.pop(seat.place, None)
    if entry is None:
        return None
    A, then, h = entry
    return (h, pending.box) if A is own.A and stamp(A) == then else None


def notes(states) -> list[str]:
    """A line of the report for every group seated."""
    from spectral_ops.integrations.peft_report import shorten

    groups = {id(s.seat.group): s.seat.group for s in states if s.seat}
    lines: dict[str, int] = {}
    for group in groups.values():
        line = ", ".join(shorten([name]).rpartition(".")[2] for name in group.names())
        lines[line] = lines.get(line, 0) + 1
    return [f"h of {line} formed once ({count} groups)" for line, count in lines.items()]
