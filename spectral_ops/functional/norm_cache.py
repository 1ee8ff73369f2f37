"""Reuse of DoRA's column norm within one optimizer step, and never beyond (METHODS 1.2, trap 2).

The norm depends on the weights only, so micro-batches and checkpoint recomputation share it. ``_version`` alone cannot
tell when it goes stale: a fused AdamW, writes through ``.data`` and FSDP2 leave it unchanged. So reuse ends at any
optimizer's step (a global hook), and within a step a fingerprint of A and B is compared on the device, without a sync.
"""

from __future__ import annotations

import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from spectral_ops._library import accumulate_dtype
from spectral_ops.functional import steps
from spectral_ops.functional.dora import column_norm_cached_op, column_norm_op, row_square_op


def _must_recompute(*tensors: torch.Tensor) -> bool:
    """While compiling, while capturing a CUDA graph, and for sharded tensors nothing may be reused."""
    if torch.compiler.is_compiling() or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return True
    if any(t.is_inference() for t in tensors):  # no version counter
        return True
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


class NormCache:
    """Column norm of one layer. In no state_dict; a copy or pickle of it starts empty. Threads may share one."""

    def __init__(self) -> None:
        steps.watch()
        self._lock = threading.Lock()
        self.invalidate()

    def invalidate(self) -> None:
        """Forget everything, the constant ‖W‖² included: call it after changing W in place through ``.data``."""
        self._weight_key = self._key = self._step = self._square = self._norm = self._stamp = None

    def get(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
        """c [d] of :func:`column_norm`; a buffer the next call overwrites, so use it before then."""
        weight, A, B = weight.detach(), A.detach(), B.detach()
        if _must_recompute(weight, A, B):
            return column_norm_op(weight, A, B, scale, None)
        with self._lock:
            return self._get(weight, A, B, scale)

    def _get(self, weight, A, B, scale):
        # another stream gets buffers of its own: nothing orders it after the kernels that filled these
        stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
        storage = StorageWeakRef(weight.untyped_storage())  # kept, so that no later weight can pass for this one
        weight_key = (storage, weight.data_ptr(), weight._version, weight.shape, weight.dtype, weight.device, stream)
        if weight_key != self._weight_key:
            self._weight_key, self._key = weight_key, None
            with torch.inference_mode(False):  # else a later training step could not write into them
                self._square = row_square_op(weight)
                self._norm = weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))
                self._stamp = torch.zeros(2, dtype=torch.int64, device=weight.device)
        key = (A.data_ptr(), A._version, B.data_ptr(), B._version, A.dtype, B.dtype, A.shape, scale)
        fresh = key == self._key and self._step == steps.current()
        column_norm_cached_op(self._norm, self._stamp, weight, A, B, scale, self._square, not fresh)
        self._key, self._step = key, steps.current()
        return self._norm

    def __deepcopy__(self, memo) -> NormCache:
        return NormCache()

    def __reduce__(self):
        return NormCache, ()
