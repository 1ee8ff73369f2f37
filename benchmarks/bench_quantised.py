"""Methods over quantised bases: step time beside the same base frozen, memory of the base, bytes saved for backward."""

import pytest
import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import D, K, T
from spectral_ops.adapters import quantised
from spectral_ops.bench import methods, results
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import counted, peak_bytes, saved_bytes
from spectral_ops.bench.layers import share, step
from spectral_ops.bench.peers import Layer

FORMATS = ("float32", "nf4", "int8")  # torchao's tensors have no storage whose bytes could be told apart
METHODS = ("lora", "pissa", "dora", "bone", "rosa", "pica", "spectral_rotation")


def base(form: str) -> nn.Module:
    """A layer [2048, 2048] in ``form``, frozen."""
    torch.manual_seed(0)
    linear = nn.Linear(K, D, bias=False).requires_grad_(False)
    return linear if form == "float32" else quantised.quantise(linear, form)


def stored(layer: nn.Module) -> list[torch.Tensor]:
    """The tensors that a weight is stored in, its scales included."""
    weight, form = layer.weight, quantised.kind(layer)
    if form == "bnb4":
        return [weight.data, weight.quant_state.absmax]
    return [weight.data, quantised.scales(layer)] if form == "bnb8" else [weight]


def constants(frozen: nn.Module, adapted, layer: nn.Module) -> list[torch.Tensor]:
    """What neither layer saves for backward: weights, as they are stored, and parameters."""
    held = [*stored(frozen), *stored(layer)]
    whole = [*adapted.parameters(), *adapted.buffers()] if isinstance(adapted, nn.Module) else []
    return held + [t for t in whole if t is not layer.weight]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_step(benchmark, record, method, form):
    frozen, layer = base(form), base(form)
    held = sum(t.numel() * t.element_size() for t in stored(layer))
    pattern = methods.even_pattern(D, K) if method == "rosa" and form == "float32" else None
    adapted, parameters = methods.layer(method, layer, pattern)
    if method == "rosa" and form != "float32":
        mask = methods.even_pattern(D, K)
        adapted.set_mask((mask.row_offsets, mask.col_indices))
    x, dy = torch.randn(T, K, requires_grad=True), torch.randn(T, D)
    layers = {"frozen": Layer(frozen, []), "spectral_ops": Layer(adapted, parameters)}
    calls = {name: (lambda layer=layer: step(layer, x, dy)) for name, layer in layers.items()}
    times = interleave(calls, lambda name: None, 5, x.device)
    known = [*constants(frozen, adapted, layer), *parameters]
    rows = []
    for name, candidate in layers.items():
        with counted() as counts:
            calls[name]()
        rows.append(
            results.Layer(
                method=f"{method} over {form}, {held / 2**20:.2f} MiB", implementation=name, device="cpu",
                dtype="float32", adapter_dtype="float32", tokens=T, out_features=D, in_features=K, rank=0,
                times=times[name], ratios=[a / b for a, b in zip(times[name], times["frozen"], strict=True)],
                **share(counts, harness.ceiling("float32")),
                saved_bytes=saved_bytes(candidate.forward, x, known), peak_bytes=peak_bytes(calls[name], x.device),
            )
        )  # fmt: skip
    ratio = rows[-1].ratio
    record(rows)
    benchmark.extra_info.update(weight_bytes=held, ratio=ratio, saved=rows[-1].saved_bytes, frozen=rows[0].saved_bytes)
    benchmark.pedantic(calls["spectral_ops"], rounds=3)
