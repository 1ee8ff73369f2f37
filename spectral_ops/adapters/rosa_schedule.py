"""When RoSA does what: LoRA alone, then gradients for a mask, then S, in one run (METHODS 2; arXiv:2401.04679).

The gradient of each adapted weight is collected in its layer's own backward from dy and x, so that layers which share
an input keep theirs apart, a quantised weight has one too, and no more than a tile of it is on the device at a time.
It is summed in float32 on the CPU. A batch is what an optimizer step consumes: its micro-batches are added before they
are squared, and so are the ranks' shares of it; how a batch is split changes nothing but rounding.
"""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function

from spectral_ops._library import accumulate_dtype
from spectral_ops.adapters.io import _safetensors, _write
from spectral_ops.adapters.rosa import RoSALinear
from spectral_ops.adapters.tree import adapter_configs, layers_of, unwrap
from spectral_ops.core.autograd import backward_pass, gradient_tiles, rows
from spectral_ops.functional import CSR
from spectral_ops.init import topk_pattern

FORMAT = 1  # of a mask file's metadata
REDUCED_ROWS = 1024  # of a gradient that goes through a GPU at a time, where the ranks talk through theirs
SLOTS = 4  # tiles on their way from a GPU


class MasksSaved(SystemExit):
    """Ends the process, with status 0, once the mask is saved (``terminate_after_mask_generation``)."""

    def __init__(self, path) -> None:
        super().__init__(0)
        self.path = path

    def __str__(self) -> str:
        return f"the masks are in {self.path}: start again with mask_load_path"


# --- collection ------------------------------------------------------------------------------------------------------


class HostSums:
    """Adds tiles to tensors on the CPU without stopping the GPU they come from: each goes through one of a few pinned
    buffers, and is added when that buffer is needed again, or at the end, after the event that its copy is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # autograd has a thread per device
        self._pending: list[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = []
        self._free: list[torch.Tensor] = []

    def add(self, target: torch.Tensor, tile: torch.Tensor) -> None:
        """target += tile, soon; the tile may be overwritten by what its stream does next."""
        if not tile.is_cuda:
            target.add_(tile)
            return
        with self._lock:
            if len(self._pending) == SLOTS:
                self._finish()
            buffer = self._free.pop() if self._free else torch.empty(0, dtype=tile.dtype, pin_memory=True)
            if buffer.numel() < tile.numel() or buffer.dtype != tile.dtype:
                buffer = torch.empty(tile.numel(), dtype=tile.dtype, pin_memory=True)
            buffer[: tile.numel()].view(tile.shape).copy_(tile, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(tile.device))
            self._pending.append((event, buffer, target))

    def _finish(self) -> None:
        event, buffer, target = self._pending.pop(0)
        event.synchronize()
        target.add_(buffer[: target.numel()].view(target.shape))
        self._free.append(buffer)

    def drain(self) -> None:
        """Wait for what is on its way."""
        with self._lock:
            while self._pending:
                self._finish()


class CollectFunction(Function):
    """y itself; its backward tells ``collector`` of dy and x. ``anchor``, which gets no gradient, makes sure that there
    is a backward even where nothing else of the layer trains."""

    @staticmethod
    def forward(ctx, y, x, anchor, collector):
        ctx.save_for_backward(x)
        ctx.collector = collector
        return torch.ops.aten._unsafe_view.default(y, y.shape)  # no view to autograd, which a caller may overwrite

    @staticmethod
    @backward_pass
    def backward(ctx, dy):
        ctx.collector.add(rows(dy), rows(*ctx.saved_tensors))
        return dy, None, None, None


class Collector:
    """The scores of one weight [d, k]: mean over batches of the squared gradient, or size of the mean gradient."""

    def __init__(self, shape: tuple[int, int], mode: str, sums: HostSums) -> None:
        self.shape, self.mode, self._sums = shape, mode, sums
        self.batch: torch.Tensor | None = None  # gradient of the batch so far
        self.total: torch.Tensor | None = None  # over the batches so far
        self.batches = 0

    def __call__(self, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return CollectFunction.apply(y, x, anchor, self)

    def add(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """Add dyᵀx of one backward, dy [T, d], x [T, k]."""
        wide = accumulate_dtype(dy.dtype)
        if not dy.is_cuda:
            dy = dy.to(wide)  # on the CPU a product is rounded to its factors' dtype
        x = x.to(dy.dtype)
        if self.batch is None:
            self.batch = torch.zeros(self.shape, dtype=wide)
        for start, G in gradient_tiles(dy, x):
            self._sums.add(self.batch[start : start + G.shape[0]], G)

    def gather(self, device: torch.device) -> bool:
        """Add the other ranks' shares of the batch; False where it is not finite (float16 with too large a scale)."""
        if self.batch is None:
            self.batch = torch.zeros(self.shape)
        _sum_over_ranks(self.batch, device)
        return bool(torch.isfinite(self.batch).all())

    def close(self, keep: bool) -> None:
        """Count the batch, or forget it."""
        batch, self.batch = self.batch, None
        if not keep:
            return
        if self.mode == "mean_squared":
            batch.square_()
        self.total = batch if self.total is None else self.total.add_(batch)
        self.batches += 1

    def scores(self) -> torch.Tensor:
        """[d, k] float32 (float64 for a float64 layer), on the CPU."""
        return self.total.abs() / self.batches


def _sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if dist.get_backend() != "nccl":
        dist.all_reduce(tensor)
        return
    for tile in tensor.split(REDUCED_ROWS):
        part = tile.to(device)
        dist.all_reduce(part)
        tile.copy_(part)


# --- mask files ------------------------------------------------------------------------------------------------------


def save_masks(model: nn.Module, path, adapter_name: str | None = None) -> None:
    """Write the masks of an adapter (default: the active one) to a safetensors file: two int32 tensors per layer."""
    name, layers = _layers(model, adapter_name)
    patterns = {p: (layer.rosa_row_offsets[name], layer.rosa_col_indices[name]) for p, layer in layers.items()}
    _save_patterns(path, patterns, {p: [layer.out_features, layer.in_features] for p, layer in layers.items()})


def _save_patterns(path, patterns, shapes) -> None:
    safetensors, path = _safetensors(), Path(path)
    tensors = {
        f"{layer}.{key}": index.cpu().contiguous()
        for layer, pattern in patterns.items()
        for key, index in zip(("row_offsets", "col_indices"), pattern, strict=True)
    }
    note = {"format": "pt", "spectral_ops_masks": json.dumps({"format": FORMAT, "shapes": shapes})}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, lambda part: safetensors.torch.save_file(tensors, part, metadata=note))


def load_masks(model: nn.Module, path, adapter_name: str | None = None) -> None:
    """Set the masks of an adapter from a file of :func:`save_masks`, values at zero.

    Raises FileNotFoundError, ValueError or IndexError naming the file and the layer, and changes nothing, where the
    file is damaged, or is of other layers, shapes or densities.
    """
    name, layers = _layers(model, adapter_name)
    _set_patterns(layers, _read_patterns(path, layers, name), name)


def _read_patterns(path, layers: dict[str, RoSALinear], name: str) -> dict[str, list[torch.Tensor]]:
    safetensors, path = _safetensors(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"mask_load_path: got {str(path)!r}, wanted a file of masks")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            note = json.loads((file.metadata() or {})["spectral_ops_masks"])
            shapes = {p: tuple(shape) for p, shape in note["shapes"].items()}
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got a truncated or damaged file ({error}), wanted masks in safetensors") from None
    if note.get("format", 0) > FORMAT:
        raise ValueError(f"{path}: got format {note['format']}, wanted at most {FORMAT}")
    if shapes.keys() != layers.keys():
        odd = sorted(shapes.keys() ^ layers.keys())
        raise ValueError(f"{path}: got masks of {len(shapes)} layers, wanted those of the model ({odd[:3]} differ)")
    patterns = {}
    for p, layer in layers.items():
        shape, nnz = (layer.out_features, layer.in_features), layer.rosa_values[name].numel()
        pattern = [tensors.get(f"{p}.{key}") for key in ("row_offsets", "col_indices")]
        if shapes[p] != shape or any(index is None for index in pattern) or pattern[1].numel() != nnz:
            raise ValueError(f"{path}: {p}: got a mask of {shapes[p]}, wanted {nnz} entries of {shape}")
        try:
            CSR(torch.zeros(nnz), *pattern, shape).validate()
        except (IndexError, TypeError, ValueError) as error:
            raise type(error)(f"{path}: {p}: {error}") from None
        patterns[p] = pattern
    return patterns


def _set_patterns(layers: dict[str, RoSALinear], patterns, name: str) -> None:
    for path, pattern in patterns.items():
        layers[path].set_mask([index.to(layers[path].rosa_values[name].device) for index in pattern], name)


def _layers(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, RoSALinear]]:
    """The name of an adapter (default: the active one), and the layers where it has a sparse part."""
    name, layers = layers_of(model, RoSALinear, adapter_name, "a RoSA")
    return name, {p: layer for p, layer in layers.items() if name in layer.rosa_values}


# --- the schedule ----------------------------------------------------------------------------------------------------


class RoSASchedule:
    """Takes an adapter through its phases: "warmup" (LoRA alone), "collect" (gradients for the mask), "train".

    Args:
        model: with a RoSA adapter attached; its config says how long each phase is.
        optimizer: a torch.optim.Optimizer whose steps are counted from now on; None: call :meth:`step` after each step.
        adapter_name: default, the active adapter.

    The optimizer may be made before or after; S's values are parameters from the start, without a gradient until there
    is a mask (so DistributedDataParallel needs ``find_unused_parameters=True`` until then). Where every layer has a
    mask already, from a loaded adapter or ``mask_load_path``, nothing is collected.
    """

    def __init__(self, model, optimizer=None, adapter_name=None):
        self.model = unwrap(model)
        self.adapter_name, self._layers = _layers(self.model, adapter_name)
        self.config = adapter_configs(self.model)[self.adapter_name]
        self.steps = 0
        self.collectors: dict[str, Collector] = {}
        self._sums, self._handle = HostSums(), None
        path = self.config.mask_load_path
        self._loaded = _read_patterns(path, self._layers, self.adapter_name) if path else None
        self._enter()
        if optimizer is not None:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer or None")
            self._handle = optimizer.register_step_post_hook(lambda *_: self.step())

    @property
    def masked(self) -> bool:
        """Whether every layer has its mask."""
        return all(layer.csr(self.adapter_name) is not None for layer in self._layers.values() if self._nnz(layer))

    def _nnz(self, layer: RoSALinear) -> int:
        return layer.rosa_values[self.adapter_name].numel()

    @property
    def phase(self) -> str:
        """The phase that the next optimizer step belongs to."""
        if self.collectors:
            return "collect"
        return "warmup" if self.steps < self.config.warmup and self._layers else "train"

    def _enter(self) -> None:
        """Set the masks of a file, or start to collect, where it is time to."""
        if self.steps < self.config.warmup or self.collectors or self.masked:
            return
        if self._loaded is not None:
            _set_patterns(self._layers, self._loaded, self.adapter_name)
            return
        for path, layer in self._layers.items():
            if self._nnz(layer):
                shape = (layer.out_features, layer.in_features)
                self.collectors[path] = Collector(shape, self.config.grad_acc_mode, self._sums)
                layer.collectors[self.adapter_name] = self.collectors[path]

    @torch.no_grad()
    def step(self) -> None:
        """Say that the optimizer has taken a step. Raises :class:`MasksSaved` where the config says to end there."""
        self.steps += 1
        if self.collectors:
            self._close_batch()
        self._enter()

    def _close_batch(self) -> None:
        self._sums.drain()
        finite = [c.gather(self._device(path)) for path, c in self.collectors.items()]
        if not all(finite):
            warnings.warn("RoSASchedule: a batch with non-finite gradients is left out of the mask", stacklevel=4)
        for collector in self.collectors.values():
            collector.close(all(finite))
        if next(iter(self.collectors.values())).batches >= self.config.spa_num_grads:
            self._set_masks()

    def _device(self, path: str) -> torch.device:
        return self._layers[path].rosa_values[self.adapter_name].device

    def _set_masks(self) -> None:
        patterns = {}
        for path, collector in self.collectors.items():
            scores, collector.total = collector.scores(), None
            if not scores.any():
                raise ValueError(
                    f"{path}: got no gradient in {collector.batches} batches, wanted a backward through the layer"
                    " (spa_num_grads says how many batches to wait for)"
                )
            patterns[path] = topk_pattern(scores.to(self._device(path)), self._nnz(self._layers[path]))
        shapes = {path: collector.shape for path, collector in self.collectors.items()}
        self._stop_collecting()
        save = self.config.mask_save_path
        if save and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            _save_patterns(save, patterns, shapes)
        if self.config.terminate_after_mask_generation:
            raise MasksSaved(save)
        _set_patterns(self._layers, patterns, self.adapter_name)

    def _stop_collecting(self) -> None:
        for path in self.collectors:
            self._layers[path].collectors.pop(self.adapter_name, None)
        self.collectors = {}

    def close(self) -> None:
        """Stop collecting and counting."""
        self._stop_collecting()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, int]:
        """How far the schedule is. Gradients collected so far are not part of it: that phase starts again."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken; load the model's state first."""
        self.steps = int(state["steps"])
        self._stop_collecting()
        self._enter()
