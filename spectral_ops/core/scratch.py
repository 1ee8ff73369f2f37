"""Work buffers shared by every layer: Bat's W', W + S, and tiles of a weight gradient.

What a buffer holds is only good inside one lease: nothing saved for backward ever lives there. So a checkpointed
forward, a second micro-batch or another layer may take the same memory at once after.
"""

from __future__ import annotations

import math

import torch

from spectral_ops._loader import EXTENSIONS

VIEWS = 64  # of a buffer that are kept: making one takes longer than a small product

_compiling, _modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_tracing = torch._guards.TracingContext.try_get


def _lasting(device: torch.device) -> bool:
    """Whether memory kept from call to call may be used: not while a compiler plans its own, and not in a CUDA graph,
    whose replays would write to an address that may by then belong to somebody else."""
    if _compiling() or _tracing() is not None:
        return False
    if _modes() and torch._guards.detect_fake_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class _Buffer:
    """Memory of one device and stream, and the views of it that were asked for."""

    __slots__ = ("memory", "views")

    def __init__(self, size: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # else later training steps could not write into it
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.views: dict[tuple, torch.Tensor] = {}

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> torch.Tensor:
        found = self.views.get((shape, dtype))
        if found is None:
            if len(self.views) >= VIEWS:
                self.views.clear()
            with torch.inference_mode(False):
                found = self.views[shape, dtype] = self.memory[:size].view(dtype).view(shape)
        return found


class _Lease:
    """What :meth:`Scratch.lease` returns."""

    __slots__ = ("scratch", "shape", "dtype", "device", "key")

    def __init__(self, scratch: Scratch, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.scratch, self.shape, self.dtype, self.device = scratch, shape, dtype, device
        self.key: tuple | None = None  # of the buffer that is held

    def __enter__(self) -> torch.Tensor:
        shape, dtype, device = self.shape, self.dtype, self.device
        if _lasting(device):
            size = math.prod(shape) * dtype.itemsize
            key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)
            if (buffer := self.scratch._take(key, size)) is not None:
                self.key = key
                return buffer.view(shape, dtype, size)
        return torch.empty(shape, dtype=dtype, device=device)

    def __exit__(self, *error) -> None:
        if self.key is not None:
            self.scratch._give_back(self.key)


class Scratch:
    """One buffer per device and stream, as large as the largest lease so far.

    limit: bytes a buffer may have; a larger lease is allocated for itself and freed after it. streams: how many buffers
    are kept; beyond that the one unused for longest goes. A lease taken while its buffer is leased already (by another
    thread, or inside another lease) gets memory of its own, so that two never share. No lock: each step is one of a
    dictionary's own, and a process that forks while another thread has a lock would never get it again.
    """

    def __init__(self, limit: int = 1 << 30, streams: int = 8) -> None:
        self.limit, self.streams = limit, streams
        self._free: dict[tuple, _Buffer] = {}  # by device and stream; the one unused for longest first
        self._leased: dict[tuple, _Buffer] = {}

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Lease:
        """An uninitialised contiguous tensor, the caller's for the duration of the ``with`` block.

        On a GPU "during" means: by kernels enqueued on the current stream inside the block.
        """
        return _Lease(self, shape, dtype, device)

    def _take(self, key: tuple, size: int) -> _Buffer | None:
        if size > self.limit or key in self._leased:
            return None
        buffer = self._free.pop(key, None)
        if buffer is None or buffer.memory.numel() < size:
            del buffer  # before its successor is allocated
            buffer = _Buffer(size, key[0])
        return buffer if self._leased.setdefault(key, buffer) is buffer else None  # another thread's, meanwhile

    def _give_back(self, key: tuple) -> None:
        self._free[key] = self._leased.pop(key)
        if len(self._free) > self.streams:
            for old in list(self._free)[: -self.streams]:
                self._free.pop(old, None)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(b.memory.numel() for b in (*self._free.copy().values(), *self._leased.copy().values()))

    def release(self) -> None:
        """Give back every buffer that is not leased at this moment."""
        self._free.clear()


class _Everything(Scratch):
    """The package's own buffers, and those that compiled layers keep on the CPU (csrc/layers/scratch.h)."""

    @property
    def nbytes(self) -> int:
        compiled = EXTENSIONS["cpu"].library
        return super().nbytes + (compiled.scratch_bytes() if compiled else 0)

    def release(self) -> None:
        super().release()
        if compiled := EXTENSIONS["cpu"].library:
            compiled.release_scratch()


scratch = _Everything()
