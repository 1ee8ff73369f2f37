"""Times the cases on a GPU beside their estimates, kernel by kernel: the misses are what to look at."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.estimates import table
from benchmarks.estimates.cases import CASES, SHAPES, TOKENS, Case, Make
from spectral_ops import BackendUnavailable, use_backend
from spectral_ops._library import OPERATORS
from spectral_ops._table import table as text
from spectral_ops.bench import judge
from spectral_ops.bench.clock import flush, interleave
from spectral_ops.bench.operators import SLACK

HEAD = ("operator", "T", "W", "backend", "us", "estimate", "ratio", "% of roofline", "kernels, us")


@dataclass
class Measured:
    """A case on a backend. seconds: the median; None where the result is wrong. kernels: seconds by name, profiled."""

    backend: str
    operator: str
    label: str
    tokens: int
    d: int
    k: int
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


def profiled(call, repeats: int = 5) -> dict[str, float]:
    """Seconds of each kernel that a call launches, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / repeats / 1e6 for event in profile.key_averages()}


def measured(case: Case, T: int, d: int, k: int, arguments: argparse.Namespace, estimates: dict) -> list[Measured]:
    """The case on every backend that runs it; a wrong result has no time."""
    device = torch.device(arguments.device)
    args = case.arguments(Make(T, d, k, arguments.device, filled=True))
    operator = OPERATORS[case.operator]
    floor, rows, calls = table.floor(case, args), {}, {}
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):

        def call(backend=backend):
            with use_backend(backend):
                return operator(*args)

        try:
            with use_backend(backend):
                error = judge.relative_error(operator, args)
        except BackendUnavailable as reason:
            print(f"{case.name} on {backend}: {reason}")
            continue
        expected = estimates.get((backend, case.operator, case.label, T, d, k))
        rows[backend] = Measured(backend, case.operator, case.label, T, d, k, error, None, floor,
                                 expected and expected.seconds)  # fmt: skip
        if not judge.wrong(error, SLACK * judge.BOUNDS[torch.bfloat16]):
            calls[backend] = call
    for backend, times in interleave(calls, flush(device), arguments.repeats, device).items():
        rows[backend].seconds = statistics.median(times)
        if device.type == "cuda":
            rows[backend].kernels = profiled(calls[backend])
    return list(rows.values())


def run(arguments: argparse.Namespace) -> int:
    """Every case at T = 8192, then at fewer tokens, until the time is up; exit status 1 where a result is wrong."""
    end = time.monotonic() + arguments.seconds
    estimates = {row.key: row for row in table.read()} if table.FILE.exists() else {}
    rows, left_out, small, tokens = [], 0, arguments.shrink, arguments.tokens or TOKENS
    for T in tokens:
        for case in CASES:
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
