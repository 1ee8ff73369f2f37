"""Work buffers shared by every layer: Bat's W', W + S, and tiles of a weight gradient.

What a buffer holds is only good inside one lease: nothing saved for backward ever lives there. So a checkpointed
forward, a second micro-batch or another layer may take the same memory at once after.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectral_ops._loader import EXTENSIONS


def _lasting(device: torch.device) -> bool:
    """Whether memory kept from call to call may be used: not while a compiler plans its own, and not in a CUDA graph,
    whose replays would write to an address that may by then belong to somebody else."""
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class Scratch:
    """One buffer per device and stream, as large as the largest lease so far.

    limit: bytes a buffer may have; a larger lease is allocated for itself and freed after it. streams: how many buffers
    are kept; beyond that the one unused for longest goes. A lease taken while its buffer is leased already (by another
    thread, or inside another lease) gets memory of its own, so that two never share.
    """

    def __init__(self, limit: int = 1 << 30, streams: int = 8) -> None:
        self.limit, self.streams = limit, streams
        self._guard = threading.Lock()
        self._buffers: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._leased: set[tuple] = set()

    @contextmanager
    def lease(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
        """An uninitialised contiguous tensor, the caller's for the duration of the ``with`` block.

        On a GPU "during" means: by kernels enqueued on the current stream inside the block.
        """
        if not _lasting(device):
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        size = math.prod(shape) * dtype.itemsize
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        key = (device, stream)
        buffer = self._take(key, size)
        if buffer is None:
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        try:
            yield buffer[:size].view(dtype).view(shape)
        finally:
            with self._guard:
                self._leased.discard(key)

    def _take(self, key: tuple, size: int) -> torch.Tensor | None:
        with self._guard:
            if size > self.limit or key in self._leased:
                return None
            buffer = self._buffers.pop(key, None)
            if buffer is None or buffer.numel() < size:
                del buffer  # before its successor is allocated
                with torch.inference_mode(False):  # else later training steps could not write into it
                    buffer = torch.empty(size, dtype=torch.uint8, device=key[0])
            self._buffers[key] = buffer
            self._leased.add(key)
            for old in list(self._buffers)[: max(len(self._buffers) - self.streams, 0)]:
                if old not in self._leased:
                    del self._buffers[old]
            return buffer

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._guard:
            return sum(b.numel() for b in self._buffers.values())

    def release(self) -> None:
        """Give back every buffer that is not leased at this moment."""
        with self._guard:
            for key in [key for key in self._buffers if key not in self._leased]:
                del self._buffers[key]


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
