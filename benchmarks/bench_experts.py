"""LoRA on the experts of a mixture: each operator of the row; and a whole layer beside PEFT's, in one run.

    python -m benchmarks.bench_experts [--device cuda] [--import MODULE...] [--implementations NAME...] [--json FILE]

One experts module of Qwen3-MoE's shape with adapters on both stacks: frozen, as PEFT runs it (it writes W + γBA of the
whole stack in every forward), accelerated, and natively adapted, all over the same weights, in interleaved turns. Time
is of forward and backward; memory is the peak of the allocator above what it held before, and "extra" what that is
above the frozen layer's. The frozen layer and PEFT's run on each of transformers' experts implementations; others that
an installed package registers there are peers: name them, and the package for --import.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import spectral_ops
from benchmarks import harness
from spectral_ops.bench.clock import interleave
from spectral_ops.bench.counting import CEILINGS, counted, peak_bytes
from spectral_ops.bench.methods import DTYPES
from spectral_ops.functional import experts


@dataclass(frozen=True)
class Shape:
    """E experts of width f over k features; each of T tokens goes to K of them; rank r on both projections."""

    experts: int
    features: int
    width: int
    per_token: int
    tokens: int
    rank: int = 16


SHAPES = {"cpu": Shape(16, 512, 256, 2, 1024), "cuda": Shape(128, 2048, 768, 8, 4096)}
IMPLEMENTATIONS = ("grouped_mm", "eager")
TIME, MEMORY = 0.5, 0.2  # of PEFT's time on the same implementation, and of its extra memory: targets on the CPU


class Layer(nn.Module):
    """An experts module as a child, which is where PEFT looks for ``target_parameters``."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(
            num_experts=shape.experts, hidden_size=shape.features, moe_intermediate_size=shape.width,
            num_experts_per_tok=shape.per_token,
        )  # fmt: skip
        config._experts_implementation = IMPLEMENTATIONS[0]
        with torch.device(device):
            self.experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
        for stack in self.experts.parameters():
            nn.init.normal_(stack, std=stack.shape[2] ** -0.5)

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def adapted(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The frozen layer, PEFT's, PEFT's accelerated and ours, over the same weights and factors."""
    import peft

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    settings = {"r": shape.rank, "lora_alpha": shape.rank, "target_modules": [], "target_parameters": targets}
    layers = {}
    for name in ("frozen", "PEFT", "accelerated", "ours"):
        torch.manual_seed(0)
        layer = Layer(shape, dtype, device)
        if name in ("PEFT", "accelerated"):
            layer = peft.get_peft_model(layer, peft.LoraConfig(**settings), autocast_adapter_dtype=False)
        elif name == "ours":
            layer = spectral_ops.attach(layer, spectral_ops.LoRAConfig(**settings))
        torch.manual_seed(1)
        for parameter in factors(layer):
            nn.init.normal_(parameter, std=0.05)
        layers[name] = layer
    spectral_ops.accelerate(layers["accelerated"], strict=True)
    return layers


def factors(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, the experts of each token, their weights, and an incoming gradient."""
    torch.manual_seed(2)
    x = torch.randn(shape.tokens, shape.features, dtype=dtype, device=device).requires_grad_()
    weights, index = torch.rand(shape.tokens, shape.experts, device=device).softmax(-1).topk(shape.per_token)
    return x, index, weights.to(dtype).requires_grad_(), torch.randn_like(x)


@dataclass
class Row:
    """One contender: milliseconds per turn, and the peak above what was held."""

    name: str
    implementation: str
    milliseconds: list[float]
    peak_bytes: int
    extra_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def measure(dtype: str, device: str, shape: Shape, implementations: list[str], repeats: int = 9) -> list[Row]:
    """A row for every contender; raises where one of them disagrees with PEFT."""
    layers = adapted(shape, DTYPES[dtype], device)
    x, index, weights, dy = inputs(shape, DTYPES[dtype], device)

    def step(layer):
        return torch.autograd.grad(layer(x, index, weights), [x, weights, *factors(layer)], dy)

    def chosen(layer, implementation):
        for module in layer.modules():
            if hasattr(module, "gate_up_proj"):
                module.config._experts_implementation = implementation

    calls, settings = {}, {}
    for name in ("frozen", "PEFT"):
        for implementation in implementations:
            key = f"{name}, {implementation}"
            calls[key], settings[key] = lambda layer=layers[name]: step(layer), (layers[name], implementation)
    for name in ("accelerated", "ours"):
        calls[name], settings[name] = lambda layer=layers[name]: step(layer), (layers[name], implementations[0])

    def enter(key):
        chosen(*settings[key])

    enter(first := f"PEFT, {implementations[0]}")
    want = calls[first]()
    for name in ("accelerated", "ours"):
        enter(name)
        for got, w in zip(calls[name](), want, strict=True):
            error = ((got.double() - w.double()).norm() / w.double().norm()).item()
            assert error < (1e-5 if dtype == "float32" else 2e-2), f"red: {name} differs from PEFT by {error:.2g}"
    del want
    times = interleave(calls, enter, repeats, x.device)
    rows = []
    for key, call in calls.items():
        enter(key)
        implementation = settings[key][1] if key not in layers else ""
        rows.append(Row(key, implementation, [1e3 * t for t in times[key]], peak_bytes(call, x.device)))
    frozen = {row.implementation: row.peak_bytes for row in rows if row.name.startswith("frozen")}
    for row in rows:
        row.extra_bytes = row.peak_bytes - frozen.get(row.implementation, min(frozen.values()))
    return rows


def table(rows: list[Row]) -> str:
    """Each contender's median, and its time and extra memory over those of PEFT on each implementation."""
    theirs = [row for row in rows if row.name.startswith("PEFT")]
    lines = ["".join([f"{'':26}{'ms':>9}{'peak MiB':>10}{'extra':>9}", *(f"{f'/{row.name}':>26}" for row in theirs)])]
    for row in rows:
        over = (
            f"{f'{row.median / other.median:.2f} time, {row.extra_bytes / other.extra_bytes:.2f} extra':>26}"
            for other in theirs
        )
        lines.append(
            f"{row.name:26}{row.median:9.2f}{row.peak_bytes / 2**20:10.1f}{row.extra_bytes / 2**20:9.1f}{''.join(over)}"
        )
    return "\n".join(lines)


def predict(shape: Shape) -> str:
    """Milliseconds on an H100 of one projection [E, k, f] of T rows, and of the whole layer, frozen and adapted.

    Forward and backward in bfloat16, from what they compute and move.
    """
    E, k, f, T, r = shape.experts, shape.features, shape.width, shape.tokens, shape.rank
    lines = []
    with FakeTensorMode():

        def empty(*sizes, trained=True):
            return torch.empty(*sizes, dtype=torch.bfloat16).requires_grad_(trained)

        def lora(d, k):
            return empty(E, r, k), empty(E, d, r), 1.0

        def projection(lora):
            offsets = torch.empty(E + 1, dtype=torch.int32)
            return [x], experts.linear(x, weight, None, lora, None, None, offsets, 0.0, True)

        def layer(up_lora, down_lora):
            index, weights = torch.empty(T, shape.per_token, dtype=torch.int64), empty(T, shape.per_token)
            given = {"up_lora": up_lora, "down_lora": down_lora}
            return [x, weights], spectral_ops.experts_mlp(x, index, weights, up, down, **given)

        weight = empty(E, k, f, trained=False)
        up, down = empty(E, 2 * f, k, trained=False), empty(E, k, f, trained=False)
        for what, call, inputs, pairs in (
            ("one projection", projection, f, [lora(k, f)]),
            ("a layer", layer, k, [lora(2 * f, k), lora(k, f)]),
        ):
            x = empty(T, inputs)
            for name, given in (("frozen", [None] * len(pairs)), ("adapted", pairs)):
                with counted() as counts:
                    leaves, y = call(*given)
                    leaves = [*leaves, *(t for pair in given if pair for t in pair[:2])]
                    torch.autograd.grad(y, leaves, torch.empty_like(y))
                ms = 1e3 * counts.seconds(*CEILINGS["sm_90"])
                lines.append(
                    f"{what:16}{name:10}{ms:7.3f} ms {counts.flops / 1e12:7.3f} TFLOP {counts.bytes / 1e9:7.3f} GB"
                )
    return "\n".join(lines)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", [*harness.operators("experts"), *harness.operators("routing")])
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_layer_beside_peft(benchmark, dtype):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    rows = measure(dtype, "cpu", SHAPES["cpu"], list(IMPLEMENTATIONS))
    print("\n" + table(rows))
    by_name = {row.name: row for row in rows}
    ours, theirs = by_name["accelerated"], by_name["PEFT, grouped_mm"]
    benchmark.extra_info.update(
        milliseconds={row.name: round(row.median, 2) for row in rows},
        extra={row.name: row.extra_bytes for row in rows},
        met=ours.median <= TIME * theirs.median and ours.extra_bytes <= MEMORY * theirs.extra_bytes,
    )
    benchmark.pedantic(lambda: None, rounds=1)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_experts", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=SHAPES)
    parser.add_argument("--dtype", default=None, choices=DTYPES)
    parser.add_argument("--shape", type=int, nargs=6, metavar=("E", "k", "f", "K", "T", "r"))
    parser.add_argument("--import", dest="imported", nargs="*", default=[], metavar="MODULE")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args(argv)
    if options.predict:
        shape = Shape(*options.shape) if options.shape else SHAPES["cuda"]
        print(f"{shape}, bfloat16, predicted for an H100\n{predict(shape)}")
        return
    for name in options.imported:
        importlib.import_module(name)
    for peer in ("unsloth", "axolotl"):
        if not importlib.util.find_spec(peer):
            print(f"{peer}: not installed, so it is no peer here")
    dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device]
    shape = Shape(*options.shape) if options.shape else SHAPES[options.device]
    rows = measure(dtype, options.device, shape, options.implementations, options.repeats)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{shape}, {dtype}, {where}\n{table(rows)}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": where, "dtype": dtype, "shape": asdict(shape), "rows": [*map(asdict, rows)]}, file)


if __name__ == "__main__":
    main()
