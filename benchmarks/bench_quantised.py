"""Methods over quantised bases: step time beside the same base frozen, memory of the base, bytes saved for backward.

`python -m benchmarks.bench_quantised` prints the table of memory over bfloat16, FP8 and nf4 alone.
"""

import pytest
import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import D, K, T
from spectral_ops.adapters import float8, quantised
from spectral_ops.bench import methods, results
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import counted, peak_bytes, saved_bytes
from spectral_ops.bench.layers import share, step
from spectral_ops.bench.peers import Layer
from spectral_ops.core.scratch import scratch

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


# --- memory: bfloat16, FP8, nf4 --------------------------------------------------------------------------------------

TOKENS, SIDE = 256, 4096  # of a layer [4096, 4096], as Llama 3 8B has two in a block
BASES = ("bf16", "fp8", "nf4")
MEMORY_METHODS = (None, "lora", "dora", "bone", "rosa")


def memory_base(form: str, side: int) -> tuple[nn.Module, int]:
    """A frozen layer [side, side] computing in bfloat16, and the bytes that its weight is stored in."""
    torch.manual_seed(0)
    linear = nn.Linear(side, side, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    if form == "bf16":
        return linear, 2 * side * side
    if form == "nf4":
        layer = quantised.quantise(linear, "nf4")
        return layer, sum(t.numel() * t.element_size() for t in stored(layer))
    block = (128, 128)
    linear.block_size, linear.weight_scale_inv = block, None
    data, scale = float8.quantise(linear.weight, float8.empty_blocks(side, side, block))
    linear.weight, linear.weight_scale_inv = nn.Parameter(data, False), nn.Parameter(scale, False)
    return linear, data.numel() + 4 * scale.numel()


def memory_row(method: str | None, form: str, tokens: int, side: int) -> tuple[int, int, int]:
    """Bytes of the weight; held for backward beside x; the most held at once in a step beside what it started with."""
    layer, held = memory_base(form, side)
    pattern = methods.even_pattern(side, side) if method == "rosa" else None
    known = list(layer.parameters())
    if method is None:
        call, parameters = (lambda x: quantised.product(layer, x)), []
    else:
        call, parameters = methods.layer(method, layer, pattern if form == "bf16" else None)
        if pattern is not None and form != "bf16":
            call.set_mask((pattern.row_offsets, pattern.col_indices))
        known += [*call.parameters(), *call.buffers()] if isinstance(call, nn.Module) else []
    x = torch.randn(tokens, side, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, side, dtype=torch.bfloat16)
    candidate = Layer(call, parameters)
    saved = saved_bytes(candidate.forward, x, [*known, *parameters])
    scratch.release()  # a tile that stays from the last call would count as held before
    return held, saved, peak_bytes(lambda: step(candidate, x, dy), x.device)


def memory_table(tokens: int = TOKENS, side: int = SIDE) -> str:
    """In MiB, as a table of Markdown."""
    lines = ["| method | " + " | ".join(f"{form}: weight, saved, peak" for form in BASES) + " |"]
    lines += ["|---" * (len(BASES) + 1) + "|"]
    for method in MEMORY_METHODS:
        cells = []
        for form in BASES:
            numbers = memory_row(method, form, tokens, side)
            cells.append(", ".join(f"{n / 2**20:.1f}" for n in numbers))
        lines.append(f"| {method or 'frozen'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("method", MEMORY_METHODS)
def test_memory(benchmark, method):
    rows = {form: memory_row(method, form, TOKENS, SIDE) for form in BASES}
    assert rows["fp8"][0] < 0.51 * rows["bf16"][0], "the weight is stored in half"
    benchmark.extra_info.update({f"{form}_bytes": row for form, row in rows.items()})
    benchmark.pedantic(memory_row, (method, "fp8", TOKENS, SIDE), rounds=1)


if __name__ == "__main__":
    print(memory_table())
