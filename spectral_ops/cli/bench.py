"""Adapter tax of one layer: its forward and backward over those of the same layer frozen, beside its peers in one run.

The implementations of a method take turns, so that a machine that drifts drifts for all of them; the tax is the median
over turns of (adapted time / frozen time in the same turn) - 1. Parameters change before every step, outside the timed
part, so that nothing cached from the weights survives. Adapters are float32, as PEFT makes them by default, or with
``--adapter-dtype same`` in the layer's dtype (PEFT's ``autocast_adapter_dtype=False``). No time is printed for a result
that differs from the peer's (PEFT's, or plain autograd's where PEFT lacks the method).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

import spectral_ops
from spectral_ops.cli import predict, review
from spectral_ops.cli.counting import saved_bytes
from spectral_ops.cli.peers import METHODS, OURS, Layer, layers
from spectral_ops.cli.results import commit
from spectral_ops.cli.shapes import DTYPES
from spectral_ops.cli.table import table
from spectral_ops.cli.timing import interleave, timer  # noqa: F401

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, outputs and gradients against the peer's


@dataclass
class Measurement:
    """One implementation of one method at one shape."""

    method: str
    implementation: str
    dtype: str
    adapter_dtype: str
    device: str
    tokens: int
    out_features: int
    in_features: int
    rank: int
    milliseconds: float
    tax: float
    saved_bytes: int
    error: float | None  # largest relative difference to the peer over output and gradients; None for the peer itself


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(
        float((p.double() - q.double()).norm() / q.double().norm().clamp_min(1e-30)) for p, q in zip(a, b, strict=True)
    )


def step(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward; returns the output and every gradient."""
    x.grad = None
    for p in layer.parameters:
        p.grad = None
    y = layer.forward(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters)]


def measure(
    method: str,
    T: int,
    d: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    repeats: int = 20,
    peers: bool = True,
) -> list[Measurement]:
    """The frozen layer, our function, and with ``peers`` the method's peers (see peers.py), in one run.

    adapter_dtype, of the parameters: float32 or ``dtype``.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, k, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(T, d, generator=generator).to(device, dtype)
    weight = (torch.randn(d, k, generator=generator) * k**-0.5).to(device, dtype)
    candidates = layers(method, weight, rank, adapter_dtype)
    peer = list(candidates)[-1]
    expected = step(candidates[peer], x, dy)
    timed = candidates if peers else {OURS: candidates[OURS]}
    errors = {name: _difference(step(layer, x, dy), expected) for name, layer in timed.items() if name != peer}
    timed = {"frozen": Layer(lambda x: F.linear(x, weight), []), **timed}
    saved = {name: saved_bytes(layer.forward, x, [weight, *layer.parameters]) for name, layer in timed.items()}

    def change_parameters(name: str) -> None:
        with torch.no_grad():
            for p in timed[name].parameters:
                p.neg_()

    calls = {name: (lambda layer=layer: step(layer, x, dy)) for name, layer in timed.items()}
    times = interleave(calls, change_parameters, repeats, x.device)
    results = []
    for name in timed:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["frozen"], strict=True))
        red = errors.get(name, 0.0) > TOLERANCE[dtype]
        nan = float("nan")
        results.append(
            Measurement(
                method, name, str(dtype).removeprefix("torch."), str(adapter_dtype).removeprefix("torch."),
                device, T, d, k, rank,
                nan if red else statistics.median(times[name]) * 1e3, nan if red else ratio - 1,
                saved[name], errors.get(name),
            )
        )  # fmt: skip
    return results


def format_measurements(results: list[Measurement]) -> str:
    """The table ``bench`` prints; RED stands where numbers differ from the peer's, in place of a time."""
    rows = []
    for m in results:
        red = m.milliseconds != m.milliseconds
        rows.append([
            m.method, m.dtype, m.adapter_dtype, m.implementation,
            "RED" if red else f"{m.milliseconds:.2f}", "RED" if red else f"{1 + m.tax:.3f}",
            f"{m.saved_bytes / 2**20:.2f}", "-" if m.error is None else f"{m.error:.1e}",
        ])  # fmt: skip
    return table(
        ["method", "dtype", "adapters", "implementation", "ms/step", "x frozen", "saved MiB", "diff to peer"], rows
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--adapter-dtype", nargs="+", choices=("float32", "same"), default=["float32"],
                        help="of the parameters; same: the layer's (default: float32, as PEFT makes them)")  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--rank", type=int, help="default: 64 for bone and bat, else 16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave the peers out of the timing")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="measure nothing: print what Llama-3-8B and 70B would cost on GPUs, on paper",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the measurements, with versions and device, to FILE")
    review.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show each method as it is done, print the table; exit status 1 where a result is red."""
    if (status := review.run(arguments)) is not None:
        return status
    if arguments.predict:
        print(predict.report())
        return 0
    results: list[Measurement] = []
    d, k = arguments.shape
    try:
        for method in arguments.methods:
            for dtype in arguments.dtype:
                for adapters in dict.fromkeys(dtype if a == "same" else a for a in arguments.adapter_dtype):
                    for T in arguments.tokens:
                        print(f"measuring {method} {dtype}, adapters {adapters}, T={T} {d}x{k} ...", flush=True)
                        rank = arguments.rank or METHODS[method]
                        results += measure(
                            method, T, d, k, rank, DTYPES[dtype], arguments.device,
                            adapter_dtype=DTYPES[adapters], repeats=arguments.repeats, peers=arguments.peers,
                        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: what was measured so far follows")
    print("\n" + format_measurements(results))
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        meta = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                "spectral_ops": spectral_ops.__version__, "commit": commit()}  # fmt: skip
        with open(arguments.json, "w") as file:
            json.dump({"meta": meta, "measurements": [asdict(m) for m in results]}, file, indent=1)
    return 1 if any(m.milliseconds != m.milliseconds for m in results) else 0
