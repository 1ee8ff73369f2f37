"""Reuse of DoRA's column norm within one optimizer step, and never beyond (METHODS 1.2, trap 2).

The norm depends on the weights only, so micro-batches and checkpoint recomputation share it. ``_version`` alone cannot
tell when it goes stale: a fused AdamW, writes through ``.data`` and FSDP2 leave it unchanged. So reuse ends at any
optimizer's step (a global hook), and within a step a fingerprint of A, B and a sample of W is compared on the device,
without a sync. So a merge, noise or another matrix written through ``.data`` is seen; ``column_norm_cached_`` says what
a sample cannot see.
"""

from __future__ import annotations

import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from spectral_ops._library import accumulate_dtype
from spectral_ops.core import steps
from spectral_ops.functional.dora import column_norm_cached_op, column_norm_op

_compiling, _dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _recomputed(weight, A, B, scale):
    """The norm in memory of its own, bit for bit that of the cache."""
    return column_norm_op(weight.detach(), A.detach(), B.detach(), scale)


class NormCache:
    """Column norm of one layer. In no state_dict; a copy or pickle of it starts empty. Threads may share one."""

    def __init__(self) -> None:
        steps.watch()
        self._lock = threading.Lock()
        self.invalidate()

    def invalidate(self) -> None:
        """Forget everything: needed only after changing a few entries of a large W through ``.data``."""
        self._weight_key = self._storage = self._key = self._step = None
        self._norm = self._stamp = None

    def get(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
        """c [d] of :func:`column_norm`; a buffer the next call overwrites, so use it before then."""
        on_gpu = weight.is_cuda
        if _compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):  # it runs again without this code
            return _recomputed(weight, A, B, scale)
        # A dispatch mode or a transform may keep or replace results: selective checkpointing skips an operator that it
        # kept, and with it a write into our buffer. Fake and sharded tensors have no memory to take a fingerprint of.
        reuse = not (_dispatch_modes() or _transforms())
        if not (reuse and type(weight) in _PLAIN and type(A) in _PLAIN and type(B) in _PLAIN):
            return _recomputed(weight, A, B, scale)
        try:
            version, A_version, B_version = weight._version, A._version, B._version
        except RuntimeError:  # tensors of inference mode have none
            return _recomputed(weight, A, B, scale)
        # another stream gets buffers of its own: nothing orders it after the kernels that filled these
        stream = torch.cuda.current_stream(weight.device).cuda_stream if on_gpu else None
        storage = weight.untyped_storage()
        weight_key = (storage._cdata, weight.data_ptr(), version, weight.shape, weight.stride(), weight.dtype, stream)
        key = (A.data_ptr(), A_version, B.data_ptr(), B_version, A.dtype, B.dtype, A.shape, scale)
        grad, step = torch.is_grad_enabled(), steps.current()
        with self._lock:
            torch._C._set_grad_enabled(False)  # torch.no_grad, in a tenth of its time
            try:
                if weight_key != self._weight_key:
                    self._start(weight, storage, weight_key)
                force = key != self._key or step != self._step
                column_norm_cached_op(self._norm, self._stamp, weight, A, B, scale, force)
                self._key, self._step = key, step
                return self._norm
            finally:
                torch._C._set_grad_enabled(grad)

    def _start(self, weight, storage, weight_key):
        """New buffers, for a new or changed weight."""
        self.invalidate()
        self._storage = StorageWeakRef(storage)  # keeps its _cdata from naming another weight's storage later
        with torch.inference_mode(False), torch.no_grad():  # else a later training step could not write into them
            self._norm = weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight.dtype))
            self._stamp = torch.zeros(2, dtype=torch.int64, device=weight.device)
        self._weight_key = weight_key

    def __deepcopy__(self, memo) -> NormCache:
        return NormCache()

    def __reduce__(self):
        return NormCache, ()
