"""RoSA's resident route: W itself holds round(W + S) (METHODS 1.5).

No product reads S, and no copy of W is made. Only the entries of W that were overwritten are kept: the *originals*.
The price is that between calls W is not the base weight. So nobody relies on what the last user left in W. Every user
asks for the content it needs right before it reads W:

* A forward or backward *claims* W. Another layer's delta is taken out, and its own is written unless it is still there.
* :meth:`Residents.restore` puts the originals back, bit for bit. (Subtracting S would round.) It is called when
  adapters are disabled, merged, saved, detached or copied, and when a product raises.
* A backward raises where an optimizer has changed the values since its forward, as autograd does for a changed saved
  tensor.

Whoever writes to W without asking, through ``.data``, say, finds his change in it: what the overwritten entries differ
by from what was written there goes into the originals before they are used. That is right for what is added to W. For
values that are copied into it, or that multiply it, W must be put back first (:meth:`Residents.restore`).

Whoever reads W without asking sees W + S. So this route is for weights that only one adapter layer reads, on one
stream, and that are not sharded.

Under a dispatch mode the scatter route stands in, with the same numbers: what a mode keeps of a call must not depend on
what W held. Writes to W are hidden from every mode, because selective checkpointing skips operators whose results it
has kept.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from spectral_ops._library import OPERATORS, accumulate_dtype
from spectral_ops.core import steps
from spectral_ops.functional.csr_matrix import Pattern


class Claim:
    """One forward's delta, for itself and its backward."""

    def __init__(self) -> None:
        steps.watch()
        self.step: int | None = None  # the optimizer step its delta was first written in


@dataclass
class Resident:
    """What is in one weight: whose delta, and the entries that it replaced."""

    base: weakref.ref  # the tensor that owns the memory
    view: tuple  # how the weight [d, k] lies in it: size, stride, offset
    pattern: Pattern
    originals: torch.Tensor  # [nnz], in the weight's dtype
    stream: int | None
    claim: Claim | None = field(default=None)
    written: torch.Tensor | None = field(default=None)  # [nnz] round(originals + S), as it was put into the weight

    def weight(self) -> torch.Tensor | None:
        """The weight [d, k]; None where nobody has it any more."""
        base = self.base()
        return None if base is None else base.detach().as_strided(*self.view)

    def catch_up(self, weight: torch.Tensor) -> None:
        """Let the originals change by what somebody has changed in the weight; to the bit the same where nobody has."""
        if self.written is None:
            return
        held = torch.empty_like(self.written)
        OPERATORS["csr_gather_"](held, weight, self.pattern.row_offsets, self.pattern.columns)
        moved = held - self.written  # NaN where both are infinite or NaN: unchanged
        sums = self.originals + moved
        self.originals, self.written = torch.where(moved.abs_() > 0, sums, self.originals), held

    def write(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """values [nnz] into ``out`` at the pattern."""
        OPERATORS["csr_scatter_"](out, values, self.pattern.row_offsets, self.pattern.columns, False)


@contextmanager
def _unseen() -> Iterator[None]:
    """Without autograd, and below every dispatch mode."""
    guard = torch._C._DisableTorchDispatch()
    try:
        with torch.no_grad():
            yield
    finally:
        del guard


def _stream(weight: torch.Tensor) -> int | None:
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None


def _view(weight: torch.Tensor) -> tuple:
    return weight.size(), weight.stride(), weight.storage_offset()


def _owner(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight._base is None else weight._base


class Residents:
    """Every weight of the process that holds somebody's delta, by its memory: tied weights are one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._by_memory: dict[tuple, Resident] = {}

    @staticmethod
    def _memory(weight: torch.Tensor) -> tuple:
        return weight.device, weight.untyped_storage().data_ptr()

    def _find(self, weight: torch.Tensor) -> Resident | None:
        key = self._memory(weight)
        resident = self._by_memory.get(key)
        base = None if resident is None else resident.base()
        if resident is not None and (base is None or self._memory(base) != key):
            del self._by_memory[key]  # freed or moved: the weight at that address is another
            return None
        return resident

    def _freed(self, key: tuple, base: weakref.ref) -> None:
        resident = self._by_memory.get(key)
        if resident is not None and resident.base is base:
            del self._by_memory[key]

    @contextmanager
    def holding(self, weight: torch.Tensor, values: torch.Tensor, pattern: Pattern, claim: Claim) -> Iterator[None]:
        """``weight`` [d, k] holds round(W + S) for whatever is enqueued inside the block, and after it until another
        claim or a restore; W again if the block raises."""
        with self._lock:
            try:
                with _unseen():
                    self._claim(weight, values, pattern, claim)
                yield
            except BaseException:
                self.restore(weight)
                raise

    def _claim(self, weight, values, pattern, claim):
        resident = self._find(weight)
        if resident is not None and resident.claim is claim:
            return
        if claim.step is not None and claim.step != steps.current():
            raise RuntimeError(
                "values: got a backward after an optimizer step that followed its forward, wanted the values of that"
                ' forward (route="resident" cannot bring them back)'
            )
        if resident is not None and resident.stream != _stream(weight):
            raise RuntimeError(
                'weight: got a second CUDA stream, wanted the one that wrote its delta (route="resident" orders'
                " nothing between streams; call restore first, or take another route)"
            )
        view = _view(weight)
        if resident is not None and (resident.pattern.columns is not pattern.columns or resident.view != view):
            self.restore(weight)
            resident = None
        if resident is None:
            key = self._memory(weight)
            base = weakref.ref(_owner(weight), functools.partial(self._freed, key))
            originals = weight.new_empty(pattern.columns.numel())
            OPERATORS["csr_gather_"](originals, weight, pattern.row_offsets, pattern.columns)
            resident = self._by_memory[key] = Resident(base, view, pattern, originals, _stream(weight))
        resident.catch_up(weight)
        wide = accumulate_dtype(weight.dtype)
        written = (resident.originals.to(wide) + values.to(wide)).to(weight.dtype)
        resident.claim = resident.written = None  # until written
        resident.write(weight, written)
        resident.claim, resident.written, claim.step = claim, written, steps.current()

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is W + S at the moment."""
        with self._lock:
            return self._find(weight) is not None

    def restore(self, weight: torch.Tensor) -> None:
        """W again, bit for bit; nothing where it holds no delta."""
        with self._lock:
            resident = self._find(weight)
            if resident is None:
                return
            with _unseen():
                base = resident.weight()
                resident.catch_up(base)
                resident.write(base, resident.originals)
            del self._by_memory[self._memory(weight)]

    @_unseen()
    def original(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of W, whatever ``weight`` holds at the moment."""
        with self._lock:
            resident = self._find(weight)
            if resident is not None and resident.view != _view(weight):  # the entries lie elsewhere in a copy
                self.restore(weight)
                resident = None
            copy = weight.clone()
            if resident is not None:
                resident.catch_up(weight)
                resident.write(copy, resident.originals)
            return copy


residents = Residents()
