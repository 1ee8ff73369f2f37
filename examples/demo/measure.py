"""Seconds per step, bytes saved for backward and peak memory, of three variants of one model.

frozen        no adapter; forward, and backward to the input embeddings (dX through every layer): the floor
peft          the adapter as PEFT runs it (plain: in plain PyTorch); forward, backward, optimizer step
spectral_ops  the same adapter through spectral_ops; forward, backward, optimizer step

All three take the input embeddings as a leaf that requires grad, so that all compute the same dX.
"""

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

VARIANTS = ("frozen", "peft", "plain", "spectral_ops")


def embed(model, ids: torch.Tensor) -> torch.Tensor:
    return model.get_input_embeddings()(ids).detach().requires_grad_()


def forward(model, ids: torch.Tensor) -> torch.Tensor:
    return model(inputs_embeds=embed(model, ids), labels=ids, use_cache=False).loss


def stepper(model, ids: torch.Tensor, optimizer=None) -> Callable[[], None]:
    """One training step, or forward+backward alone without an optimizer; returns when the device has finished it."""

    def step():
        forward(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def interleave(
    steps: dict[str, Callable[[], None]],
    *,
    rounds: int,
    enter: Callable[[str], None] = lambda variant: None,
    min_block_s: float = 0.5,
    on_block: Callable[[str, float], None] = lambda variant, seconds: None,
) -> tuple[dict[str, float], int]:
    """Median seconds per step of each variant, measured so that drift of the machine cancels.

    Every round times one block of equal length of every variant, in rotating order; `enter(variant)` prepares its
    block and is not timed. A block is one step, or as many as fill `min_block_s`. Returns the medians and that length.
    """
    names = list(steps)

    def block(name: str, n: int) -> float:
        enter(name)
        start = time.perf_counter()
        for _ in range(n):
            steps[name]()
        return (time.perf_counter() - start) / n

    for name in names:
        block(name, 1)  # warm-up
    n = max(1, min(50, round(min_block_s / block(names[0], 1))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            seconds[name].append(block(name, n))
            on_block(name, seconds[name][-1])
    return {name: statistics.median(values) for name, values in seconds.items()}, n


class _Saved:
    """Holds one tensor that autograd saved; weakly referenced, so that freed ones are not counted."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor):
        self.tensor = tensor.detach()


@contextmanager
def saved_for_backward(model):
    """Yields a function giving the bytes autograd now holds: distinct storages, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor):
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    def total() -> int:
        storages = (saved.tensor.untyped_storage() for saved in held)
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield total


def saved_bytes(model, ids: torch.Tensor) -> int:
    """Bytes held for backward at the end of one forward pass."""
    with saved_for_backward(model) as total:
        loss = forward(model, ids)
        bytes_ = total()
    del loss
    return bytes_


@contextmanager
def peak_memory(device: torch.device):
    """Yields a function giving the peak since entry, in bytes: CUDA's allocator, or this process' resident set."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
        yield lambda: next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
    except OSError:  # no such file: the peak since the process began, in KiB (bytes on macOS)
        unit = 1 if sys.platform == "darwin" else 1024
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def probe(model, ids: torch.Tensor) -> dict[str, int]:
    """Saved bytes and the peak of one step of `model`, after one warm-up step that allocates the optimizer's state."""
    weights = [p for p in model.parameters() if p.requires_grad]
    step = stepper(model, ids, torch.optim.AdamW(weights, lr=1e-5) if weights else None)
    saved = saved_bytes(model, ids)
    step()
    with peak_memory(ids.device) as peak:
        step()
        return {"saved": saved, "peak": peak()}


def probe_in_subprocess(script: str, arguments: list[str]) -> dict[str, int]:
    """What `script --probe …` prints: a fresh process each, because a used one keeps memory that it has freed."""
    done = subprocess.run([sys.executable, script, *arguments], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
