"""Times the cases on a GPU beside their estimates, kernel by kernel: the misses are what to look at."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.estimates import table
from benchmarks.estimates.cases import CASES, MORE, SHAPES, TOKENS, Case, Make
from spectral_ops import BackendUnavailable, use_backend
from spectral_ops._library import OPERATORS
from spectral_ops._table import table as text
from spectral_ops.bench import judge
from spectral_ops.bench.clock import flush, interleave
from spectral_ops.bench.operators import SLACK

HEAD = ("operator", "T", "W", "backend", "us", "estimate", "ratio", "% of roofline", "kernels, us")


@dataclass
class Measured(table.Place):
    """A measurement. seconds: the median; None where the result is wrong. kernels: seconds by name, profiled."""

    error: float
    seconds: float | None
    floor: float
    estimate: float | None
    kernels: dict[str, float] = field(default_factory=dict)

    def cells(self) -> list[str]:
        name, where = f"{self.operator} {self.label}".strip(), f"{self.d}x{self.k}"
        if self.seconds is None:
            return [name, str(self.tokens), where, self.backend, "RED", "-", "-", "-", f"error {self.error:.1e}"]
        expected = ("-", "-") if self.estimate is None else (
            f"{1e6 * self.estimate:.1f}", f"{self.seconds / self.estimate:.2f}")  # fmt: skip
        parts = ", ".join(f"{name.split('<')[0]} {1e6 * s:.1f}" for name, s in self.kernels.items())
        share = f"{100 * self.floor / self.seconds:.0f}"
        return [name, str(self.tokens), where, self.backend, f"{1e6 * self.seconds:.1f}", *expected, share, parts]


def profiled(call, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Seconds of each kernel that a call launches, by name, with a cold L2; nothing where it cannot be profiled."""
    buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(repeats):
                buffer.zero_()
                call()
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"no times of single kernels: {error}")
        return {}
    events = {event.key: event.device_time_total / repeats / 1e6 for event in profile.key_averages()}
    return {name: time for name, time in events.items() if time and "at::native" not in name}


def measured(case: Case, T: int, d: int, k: int, arguments: argparse.Namespace, estimates: dict) -> list[Measured]:
    """The case on every backend that runs it, each on arguments of its own; a wrong result, or none, has no time."""
    device = torch.device(arguments.device)
    args = case.arguments(Make(T, d, k, arguments.device, filled=True))
    operator = OPERATORS[case.operator]
    floor, rows, calls = table.floor(case, args), {}, {}
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        own = judge.converted(args)  # a stamp is one backend's

        def call(backend=backend, own=own):
            with use_backend(backend):
                return operator(*own)

        try:
            with use_backend(backend):
                error = judge.relative_error(operator, args)
            call()
        except BackendUnavailable as reason:
            print(f"{case.name} on {backend}: {reason}")
            continue
        except Exception as raised:  # a kernel that does not compile or start: the other cases still tell something
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the GPU is lost
            print(f"{case.name} on {backend}: {type(raised).__name__}: {str(raised).partition(chr(10))[0]}", flush=True)
            error = float("inf")
        place = backend, case.operator, case.label, T, d, k
        expected = estimates.get(place)
        rows[backend] = Measured(*place, error, None, floor, expected and expected.seconds)
        if not judge.wrong(error, SLACK * judge.BOUNDS[torch.bfloat16]):
            calls[backend] = call
    for backend, times in interleave(calls, between(device), arguments.repeats, device).items():
        rows[backend].seconds = statistics.median(times)
        if device.type == "cuda":
            rows[backend].kernels = profiled(calls[backend], device)
    return list(rows.values())


def between(device: torch.device) -> Callable[[str], None]:
    """Before a timed call: a CPU's caches are overwritten; a GPU is kept busy until the host has enqueued the call."""
    return (lambda _: torch.cuda._sleep(1_500_000)) if device.type == "cuda" else flush(device)


def run(arguments: argparse.Namespace) -> int:
    """Every case at T = 8192, at fewer tokens, then what only Triton has, until the time is up; exit status 1 where a
    result is wrong."""
    end = time.monotonic() + arguments.seconds
    estimates = {row.key: row for row in table.read()} if table.FILE.exists() else {}
    rows, left_out, small, tokens = [], 0, arguments.shrink, arguments.tokens or TOKENS
    for cases, T in (*((CASES, T) for T in tokens), (MORE, tokens[0])):
        for case in cases:
            for d, k in SHAPES:
                if not case.tokens and T != tokens[0]:
                    continue
                if time.monotonic() > end:
                    left_out += 1
                    continue
                found = measured(case, T, d // small, k // small, arguments, estimates)
                for row in found:
                    print("  ".join(row.cells()), flush=True)
                rows += found
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n" + text(HEAD, [row.cells() for row in rows]))
    if left_out:
        print(f"{left_out} measurements were left out: {arguments.seconds:.0f} s were over")
    return int(any(row.seconds is None for row in rows))
