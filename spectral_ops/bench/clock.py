"""Clocks: one call, several in turns, and the rates that a device's library reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from spectral_ops.bench.results import Ceiling

WARM_UP = 2  # turns


def timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of one call: CUDA events on a GPU, after L2 was overwritten; the monotonic clock on a CPU."""
    if device.type != "cuda":

        def host(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return host

    buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # larger than any L2

    def events(call: Callable[[], object]) -> float:
        buffer.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return events


def interleave(
    calls: dict[str, Callable[[], object]], between: Callable[[str], None], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call name and turn: every turn runs all calls once, in an order that rotates."""
    clock, names = timer(device), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP, repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            between(name)
            seconds = clock(calls[name])
            if turn >= 0:
                times[name].append(seconds)
    return times


def repeat(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call: triton's do_bench on a GPU where triton is installed, else as :func:`interleave`."""
    if device.type == "cuda":
        try:
            from triton.testing import do_bench
        except ImportError:
            pass
        else:
            return [1e-3 * ms for ms in do_bench(call, warmup=10, rep=50, return_mode="all")]
    return interleave({"": call}, lambda _: None, repeats, device)[""]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache that a copy must not fit into; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    found = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        found.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1))
    return max(found)


def flush(device: torch.device) -> Callable[[str], None]:
    """Between two timings: overwrites a CPU's caches. A GPU's are the timer's concern."""
    if device.type == "cuda":
        return lambda _: None
    buffer = torch.empty(max(2 * last_level_cache(device), 2**26), dtype=torch.int8)
    return lambda _: buffer.zero_()


def copy_rate(device: torch.device, repeats: int = 5, scale: int = 8) -> float:
    """Bytes per second, read and written, of a copy of ``scale`` times the last cache, 128 MiB at least.

    Random bits, for a chip's clock depends on what it moves; the fastest of ``repeats`` copies.
    """
    elements = max(2**27, scale * last_level_cache(device)) // 4
    source = torch.empty(elements, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return 2 * 4 * elements / min(repeat(lambda: target.copy_(source), repeats, device))


def product_rate(
    dtype: torch.dtype, device: torch.device, repeats: int = 5, sizes: tuple[int, ...] = (), limit: float = 10.0
) -> float:
    """FLOP per second of the library's n x n x n product, at the best of ``sizes`` (a few for each kind of device).

    Ascending; those that would take more than ``limit`` seconds, by the best rate so far, are left out: a CPU without
    instructions for bfloat16 multiplies it at 1 GFLOP/s, at every size.
    """
    best = 0.0
    for n in sizes or ((1024, 4096, 8192) if device.type == "cuda" else (256, 1024, 2048)):
        if best and (repeats + WARM_UP) * 2 * n**3 > limit * best:
            break
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = min(repeat(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats, device))
        best = max(best, 2 * n**3 / seconds)
    return best


def measure_ceilings(device: str | torch.device, dtypes: dict[str, torch.dtype], **options) -> dict[str, Ceiling]:
    """The ceilings of a device by the name of the dtype, measured now; ``options`` of :func:`product_rate`."""
    device = torch.device(device)
    moved = copy_rate(device)
    return {name: Ceiling(product_rate(dtype, device, **options), moved) for name, dtype in dtypes.items()}
