"""What a layer costs the host: forward and backward of a small layer, where the arithmetic takes next to no time."""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

from spectral_ops.bench.layers import step
from spectral_ops.bench.peers import FROZEN, METHODS, OURS, Layer, Subject
from spectral_ops.bench.results import Overhead

SIZE = 256  # features in and out; every method's usual rank fits
TOKENS = (1, 128)


def measure(method: str, device: str, *, seconds: float = 0.2, peers: bool = True) -> list[Overhead]:
    """nn.Linear frozen, ours and with ``peers`` PEFT's, float32, by torch.utils.benchmark for ``seconds`` each."""
    weight = torch.randn(SIZE, SIZE, device=device) * SIZE**-0.5
    linear = torch.nn.Linear(SIZE, SIZE, bias=False, device=device).requires_grad_(False)
    subject = Subject(method, weight, METHODS[method])
    layers = {FROZEN: Layer(linear, []), OURS: subject.ours}
    if peers:
        layers |= {name: build() for name, build in subject.peers().items() if name.startswith("PEFT")}
    rows = []
    for T in TOKENS:
        x, dy = torch.randn(T, SIZE, device=device, requires_grad=True), torch.randn(T, SIZE, device=device)
        for name, layer in layers.items():
            timed = Timer("step(layer, x, dy)", globals={"step": step, "layer": layer, "x": x, "dy": dy})
            times = timed.blocked_autorange(min_run_time=seconds).times
            rows.append(Overhead(name=method, implementation=name, tokens=T, times=times))
    return rows
