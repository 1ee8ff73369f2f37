"""Singular triplets that are kept: in memory for whoever asks next, in a file for the next start of the same job.

Both go by what a weight holds, not where it lies (:func:`fingerprint`): a write through ``.data`` is noticed, and a
model that is loaded a second time in one process finds what the first one left, although PiSSA changed that one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from spectral_ops import _files

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U [d, r], S [r], Vᵀ [r, k]

FORMAT = 1  # of the file's metadata
FILE = "svd.safetensors"
TILE = 2**18  # entries of a weight that the fingerprint widens at a time
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- what tells weights apart ----------------------------------------------------------------------------------------


def _coefficients(n: int, start: int, device: torch.device) -> torch.Tensor:
    """n fixed odd int64 that look random (the mixing step of splitmix64)."""
    z = torch.arange(start, start + n, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ (z >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27)) * (0x94D049BB133111EB - 2**64)
    return z | 1


@torch.no_grad()
def fingerprint(weight: torch.Tensor) -> str:
    """64 bits, in hexadecimal, of every value of a weight [d, k] at its place, and its dtype and shape.

    The same on every device; integer sums, so no order of adding changes it. Reads the weight once and waits for it.
    """
    d, k = weight.shape
    bits = weight.detach().view(BITS[weight.element_size()])
    columns, rows = _coefficients(k, 1, weight.device), _coefficients(d, 2**32, weight.device)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    step = max(TILE // max(k, 1), 1)
    for start in range(0, d, step):
        part = slice(start, start + step)
        tile = bits[part].long()
        tile = tile ^ (tile >> 32) if weight.element_size() == 8 else tile  # else a sign, 2⁶³, vanishes in a sum of two
        total += ((tile * columns).sum(1) * rows[part]).sum()
    return f"{total.item() & (2**64 - 1):016x} {str(weight.dtype).removeprefix('torch.')} {d}x{k}"


# --- in memory -------------------------------------------------------------------------------------------------------


class Cache:
    """Decompositions by what they are of, the longest unused dropped first; on the CPU, where they crowd out nothing.

    ``limit``: bytes held in all. An exact decomposition is kept whole (any mode and rank is a part of it), a randomized
    one as the r triplets that were asked for. What is larger than the limit by itself is not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple, Triplets] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for triplets in self._held.values() for t in triplets)

    def get(self, key: tuple) -> Triplets | None:
        """What was kept under ``key``, on the CPU; not to be written to."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: tuple, triplets: Triplets) -> None:
        """Keep a copy of ``triplets``."""
        size = sum(t.nbytes for t in triplets)
        if size > self.limit:
            return
        kept = tuple(t.detach().to("cpu", copy=True).contiguous() for t in triplets)
        with self._lock:
            while self._held and self.nbytes + size > self.limit:
                self._held.popitem(last=False)
            self._held[key] = kept

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()


cache = Cache(2**30)  # a gibibyte: every exact decomposition of a model of a hundred million parameters


def clear_svd_cache() -> None:
    """Free the decompositions that are kept in memory (at most ``init.svd_cache.cache.limit`` bytes, 1 GiB)."""
    cache.clear()


def cacheable(weight: torch.Tensor) -> bool:
    """Whether a weight has values to go by: no sharded, fake or meta tensor."""
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device.type != "meta"


# --- in a file -------------------------------------------------------------------------------------------------------


class SVDFile:
    """The triplets that the layers of one model started from, in ``directory``/svd.safetensors.

    Each layer's are stored under its path with the :func:`fingerprint` of its weight; another weight there is an error.
    """

    def __init__(self, directory) -> None:
        self.path = Path(directory) / FILE
        self._tensors: dict[str, torch.Tensor] = {}
        self._fingerprints: dict[str, str] = {}
        self._changed = False
        self._safetensors = _files.safetensors()
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with self._safetensors.safe_open(str(self.path), framework="pt") as file:
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}
                note = json.loads((file.metadata() or {})["spectral_ops_svd"])
            self._fingerprints = dict(note["weights"])
            version = int(note["format"])
        except (self._safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"svd_cache_dir: got a truncated or damaged {self.path} ({error}), wanted what an earlier attach wrote"
            ) from None
        if version > FORMAT:
            raise ValueError(f"svd_cache_dir: got {self.path} in format {version}, wanted at most {FORMAT}")

    def get(self, layer: str, kind: str, mark: str) -> Triplets | None:
        """The triplets of ``kind`` stored for ``layer``, or None; ValueError where they are of another weight."""
        if self._fingerprints.get(layer, mark) != mark:
            raise ValueError(
                f"svd_cache_dir: got {self.path} made from another weight ({self._fingerprints[layer]}) than this one"
                f" ({mark}), wanted the file of this base model (remove it, or give another directory)"
            )
        found = tuple(self._tensors.get(f"{layer}:{kind}:{name}") for name in ("U", "S", "Vh"))
        return None if any(t is None for t in found) else found

    def put(self, layer: str, kind: str, mark: str, triplets: Triplets) -> None:
        """Store ``triplets`` when the file is written."""
        for name, tensor in zip(("U", "S", "Vh"), triplets, strict=True):
            self._tensors[f"{layer}:{kind}:{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
        self._fingerprints[layer] = mark
        self._changed = True

    def save(self) -> None:
        """Write the file, if anything is new in it."""
        if not self._changed:
            return
        note = {"format": FORMAT, "weights": self._fingerprints}
        metadata = {"format": "pt", "spectral_ops_svd": json.dumps(note)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _files.write(self.path, lambda part: self._safetensors.torch.save_file(self._tensors, part, metadata=metadata))
        self._changed = False


_current: ContextVar[tuple[SVDFile, str] | None] = ContextVar("svd_file", default=None)


@contextmanager
def stored(file: SVDFile | None, layer: str) -> Iterator[None]:
    """Decompositions within are looked up in ``file``, and go into it, under the name ``layer``."""
    token = _current.set(None if file is None else (file, layer))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> tuple[SVDFile, str] | None:
    """The file and layer of the :func:`stored` around this call."""
    return _current.get()
