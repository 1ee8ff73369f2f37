"""The work buffer shared by every layer: Bat's W', W + S, and tiles of a weight gradient.

Fresh memory on a CPU is paid for page by page, in every call; so one buffer is kept there. On a GPU torch's allocator
keeps memory by itself. What a buffer holds is only good inside one lease: nothing saved for backward ever lives there.
So a checkpointed forward, a second micro-batch or another layer may take the same memory at once after.
"""

from __future__ import annotations

import math
import threading

import torch

from spectral_ops._loader import EXTENSIONS

VIEWS = 64  # of the buffer that are kept: making one takes longer than a small product

_compiling, _modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_tracing = torch._guards.TracingContext.try_get


def _planned() -> bool:
    """Whether a compiler plans memory of its own."""
    return _compiling() or _tracing() is not None or (_modes() and torch._guards.detect_fake_mode() is not None)


class _Lease:
    """What :meth:`Scratch.lease` returns."""

    __slots__ = ("scratch", "shape", "dtype", "device", "held")

    def __init__(self, scratch: Scratch, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.scratch, self.shape, self.dtype, self.device = scratch, shape, dtype, device
        self.held = False

    def __enter__(self) -> torch.Tensor:
        if self.device.type == "cpu" and not _planned():
            view = self.scratch._take(self.shape, self.dtype)
            if view is not None:
                self.held = True
                return view
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def __exit__(self, *error) -> None:
        if self.held:
            self.scratch._token.release()


class Scratch:
    """One buffer, as large as the largest lease so far.

    limit: bytes it may have; a larger lease is allocated for itself and freed after it. A lease taken while the buffer
    is leased already (by another thread, or inside another lease) gets memory of its own, so that two never share.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._token = threading.Lock()  # nobody waits for it: a process forked meanwhile would wait for ever
        self._memory: torch.Tensor | None = None
        self._views: dict[tuple, torch.Tensor] = {}

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Lease:
        """An uninitialised contiguous tensor, the caller's for the duration of the ``with`` block."""
        return _Lease(self, shape, dtype, device)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A view of the buffer, which has to be given back; None where somebody has it, or it may not be so large."""
        size = math.prod(shape) * dtype.itemsize
        if size > self.limit or not self._token.acquire(blocking=False):
            return None
        try:
            view = self._views.get((shape, dtype))
            return self._view(shape, dtype, size) if view is None else view
        except BaseException:
            self._token.release()
            raise

    def _view(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # else later training steps could not write into it
            if self._memory is None or self._memory.numel() < size:
                self._drop()  # before its successor is allocated
                self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever the default device
            if len(self._views) >= VIEWS:
                self._views.clear()
            view = self._views[shape, dtype] = self._memory[:size].view(dtype).view(shape)
        return view

    def _drop(self) -> None:
        self._memory = None
        self._views.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        memory = self._memory
        return 0 if memory is None else memory.numel()

    def release(self) -> None:
        """Give the buffer back, unless it is leased at this moment."""
        if self._token.acquire(blocking=False):
            self._drop()
            self._token.release()


class _Everything(Scratch):
    """The package's own buffer, and that of the compiled layers (csrc/layers/scratch.h)."""

    @property
    def nbytes(self) -> int:
        compiled = EXTENSIONS["cpu"].library
        return super().nbytes + (compiled.scratch_bytes() if compiled else 0)

    def release(self) -> None:
        super().release()
        if compiled := EXTENSIONS["cpu"].library:
            compiled.release_scratch()


scratch = _Everything()
