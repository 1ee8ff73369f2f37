"""Forward and backward of one layer: frozen, ours and its peers, in one interleaved run.

The implementations take turns, so that a machine that drifts drifts for all of them; a ratio is the time over the
frozen layer's in the same turn. Parameters change before every step, outside the timed part, so that nothing cached
from the weights survives. Each result is compared with the method's formula in a wider dtype, on the same values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

try:
    from torch.utils.benchmark import Timer
except ModuleNotFoundError:  # torch 2.10's imports setuptools, which torch need not bring
    Timer = None

from spectral_ops.bench import judge, results
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import Counts, counted, peak_bytes, saved_bytes
from spectral_ops.bench.peers import FROZEN, METHODS, OURS, Layer, Subject

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
SMALL, FEW = 256, (1, 128)  # of the overhead: features in and out, which every usual rank fits; tokens


def _clear(layer: Layer, x: torch.Tensor) -> None:
    for t in (x, *layer.parameters):
        t.grad = None


def step(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward; returns the output and every gradient."""
    _clear(layer, x)
    y = layer.forward(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters)]


def _in_wider(subject: Subject, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """The formula's output and gradients in a wider dtype than x's."""
    wide = WIDER[x.dtype]
    weight = subject.weight.to(wide)
    layer = Layer(lambda x: subject.formula(x, weight), subject.parameters)
    return step(layer, x.detach().to(wide).requires_grad_(), dy.to(wide))


def share(counts: Counts, ceiling: results.Ceiling) -> dict[str, float]:
    """The counted fields of a result."""
    seconds = counts.seconds(ceiling.flops_per_second, ceiling.bytes_per_second)
    return {"flops": counts.flops, "bytes": counts.bytes, "floor_seconds": seconds}


def _constants(subject: Subject, layer: Layer) -> list[torch.Tensor]:
    """What no layer saves for backward, because it is there anyway: the weight, parameters and buffers."""
    modules = [m for m in (subject.adapted, layer.forward) if isinstance(m, torch.nn.Module)]
    held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return [subject.weight, *subject.parameters, *layer.parameters, *held]


def _negate(layer: Layer) -> None:
    with torch.no_grad():
        for p in layer.parameters:
            p.neg_()


def measure(
    method: str,
    T: int,
    d: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
    ceiling: results.Ceiling,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    repeats: int = 20,
    peers: bool = True,
    compiled: bool = False,
    note: Callable[[str], None] = print,
) -> list[results.Layer]:
    """The frozen layer, ours, and with ``peers`` what peers.py knows of the method, over a weight [d, k] and x [T, k].

    adapter_dtype, of the parameters: float32 or ``dtype``. compiled: PEFT under torch.compile as well. note: told of a
    peer that raised and was left out.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, dy = randn(T, k).to(dtype).requires_grad_(), randn(T, d).to(dtype)
    weight = (randn(d, k) * k**-0.5).to(dtype)
    subject = Subject(method, weight, rank, adapter_dtype)
    expected = _in_wider(subject, x, dy)
    layers = {FROZEN: Layer(lambda x: F.linear(x, weight), []), OURS: subject.ours}
    errors: dict[str, float | None] = {FROZEN: None, OURS: judge.largest_error(step(subject.ours, x, dy), expected)}
    for name, build in subject.peers(compiled).items() if peers else ():
        try:
            layers[name] = build()
            errors[name] = judge.largest_error(step(layers[name], x, dy), expected)
        except Exception as error:  # a peer is other people's code, which may refuse this device, dtype or size
            layers.pop(name, None)
            note(f"{name} left out of {method}: {type(error).__name__}: {str(error).splitlines()[0]}")
    del expected
    rows = {}
    for name, layer in layers.items():
        _negate(layer)
        plain = layers.get("PEFT", layer) if name == "PEFT compiled" else layer  # a mode would unmake the compilation
        with counted() as counts:
            step(plain, x, dy)
        if name == OURS:
            with FlopCounterMode(display=False) as check:
                step(layer, x, dy)
            if check.get_total_flops() != counts.flops:
                note(f"{method}: {counts.flops} FLOPs counted, torch's counter says {check.get_total_flops()}")
        _clear(layer, x)
        rows[name] = share(counts, ceiling) | {
            "saved_bytes": saved_bytes(layer.forward, x, _constants(subject, layer)),
            "peak_bytes": peak_bytes(lambda layer=layer: step(layer, x, dy), x.device),
        }
    calls = {name: (lambda layer=layer: step(layer, x, dy)) for name, layer in layers.items()}
    times = interleave(calls, lambda name: _negate(layers[name]), repeats, x.device)
    return [
        results.Layer(
            method=method,
            implementation=name,
            device=x.device.type,
            dtype=str(dtype).removeprefix("torch."),
            adapter_dtype=str(adapter_dtype).removeprefix("torch."),
            tokens=T,
            out_features=d,
            in_features=k,
            rank=rank,
            times=times[name],
            ratios=[a / b for a, b in zip(times[name], times[FROZEN], strict=True)],
            error=errors[name],
            red=judge.wrong(errors[name], judge.LAYER[dtype]),
            **row,
        )  # fmt: skip
        for name, row in rows.items()
    ]


def measure_overhead(method: str, device: str, *, seconds: float = 0.2, peers: bool = True) -> list[results.Overhead]:
    """What a layer costs the host: forward and backward of a small float32 layer, with next to no arithmetic.

    nn.Linear frozen, ours and with ``peers`` PEFT's, by torch.utils.benchmark for ``seconds`` each.
    """
    if Timer is None:
        raise ImportError(
            "the overhead of small layers needs setuptools, which is not installed (pip install setuptools)"
        )
    weight = torch.randn(SMALL, SMALL, device=device) * SMALL**-0.5
    linear = torch.nn.Linear(SMALL, SMALL, bias=False, device=device).requires_grad_(False)
    subject = Subject(method, weight, METHODS[method])
    layers = {FROZEN: Layer(linear, []), OURS: subject.ours}
    if peers:
        layers |= {name: build() for name, build in subject.peers().items() if name.startswith("PEFT")}
    rows = []
    for T in FEW:
        x, dy = torch.randn(T, SMALL, device=device, requires_grad=True), torch.randn(T, SMALL, device=device)
        for name, layer in layers.items():
            timed = Timer("step(layer, x, dy)", globals={"step": step, "layer": layer, "x": x, "dy": dy})
            times = timed.blocked_autorange(min_run_time=seconds).times
            rows.append(results.Overhead(name=method, implementation=name, tokens=T, times=times))
    return rows
