"""Host time: one token through a 64×64 layer on one thread, where the arithmetic takes next to nothing.

    python -m benchmarks.bench_host [--device cuda] [METHOD...]

PEFT's layer, the same layer accelerated, and ours, in interleaved turns of one run: below some two thousand tokens a
GPU waits for the host, so this decides there. A target that the accelerated layer misses is written beside the figure;
a ratio above ``LIMIT`` fails.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import peft
import pytest
import torch
from torch import nn

import spectral_ops

SIZE, TURNS, CALLS = 64, 31, 40
LORA, MISS = {"r": 16, "lora_alpha": 32}, {"r": 16}
METHODS = {
    "lora": peft.LoraConfig(**LORA),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "lora, dropout": peft.LoraConfig(**LORA, lora_dropout=0.1),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "miss": peft.MissConfig(**MISS),
    "mini": peft.MissConfig(**MISS, init_weights="mini", mini_r=16),
    "bat": peft.MissConfig(**MISS, init_weights="bat"),
    "adalora": peft.AdaLoraConfig(init_r=16, target_r=8, lora_alpha=32, total_step=100),
}
NATIVE = {
    "lora": spectral_ops.LoRAConfig(**LORA),
    "rslora": spectral_ops.LoRAConfig(**LORA, use_rslora=True),
    "lora, dropout": spectral_ops.LoRAConfig(**LORA, lora_dropout=0.1),
    "dora": spectral_ops.DoRAConfig(**LORA),
    "miss": spectral_ops.BoneConfig(**MISS),
    "mini": spectral_ops.BoneConfig(**MISS, init_weights="mini", mini_r=16),
    "bat": spectral_ops.BatConfig(**MISS),
    "adalora": spectral_ops.AdaLoRAConfig(init_r=16, target_r=8, lora_alpha=32, total_step=100),
}
TARGETS = {"train": {"dora": 0.60}, "inference": {}}  # over PEFT's; else:
USUAL = {"train": 0.80, "inference": 0.70}
LIMIT = 1.0


def layers(method: str, device: str = "cpu") -> dict[str, nn.Module]:
    """The frozen layer, PEFT's, PEFT's accelerated, and ours, over one weight."""
    torch.manual_seed(0)
    linear = nn.Linear(SIZE, SIZE, bias=False, device=device).requires_grad_(False)
    settings = copy.deepcopy(METHODS[method])
    settings.target_modules = ["0"]
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), settings)
    fused = copy.deepcopy(model)
    spectral_ops.accelerate(fused, strict=True)
    native = nn.Sequential(copy.deepcopy(linear))
    config = copy.deepcopy(NATIVE[method])
    config.target_modules = ["0"]
    spectral_ops.attach(native, config)
    return {
        "frozen": linear,
        "PEFT": model.base_model.model[0],
        "accelerated": fused.base_model.model[0],
        "ours": native[0],
    }


def train(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    layer(x).backward(dy)


def inference(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def measure(method: str, mode: str, turns: int = TURNS, calls: int = CALLS, device: str = "cpu") -> dict[str, float]:
    """Medians over interleaved turns, µs per call; on a GPU what the host takes to launch, not what the GPU takes."""
    step = {"train": train, "inference": inference}[mode]
    found = layers(method, device)
    x = torch.randn(1, SIZE, device=device, requires_grad=mode == "train")
    dy = torch.randn(1, SIZE, device=device)
    times = {name: [] for name in found}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(turns + 3):  # the first three warm up
            for name, layer in found.items():
                layer.train(mode == "train")
                if device == "cuda":
                    torch.cuda.synchronize()  # else a turn would wait for the launches of the one before it
                start = time.perf_counter()
                for _ in range(calls):
                    step(layer, x, dy)
                if turn >= 3:
                    times[name].append((time.perf_counter() - start) / calls * 1e6)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def line(method: str, mode: str, found: dict[str, float]) -> str:
    """One row: microseconds, then the accelerated layer's and ours over PEFT's, and the target."""
    target = TARGETS[mode].get(method, USUAL[mode])
    ratios = [found[name] / found["PEFT"] for name in ("accelerated", "ours")]
    missed = "" if ratios[0] <= target else "  missed"
    figures = "".join(f"{value:9.1f}" for value in found.values())
    return f"{method:14}{mode:10}{figures}{ratios[0]:8.2f}{ratios[1]:8.2f}{target:8.2f}{missed}"


HEAD = f"{'':14}{'':10}{'frozen':>9}{'PEFT':>9}{'accel.':>9}{'ours':>9}{'/PEFT':>8}{'/PEFT':>8}{'target':>8}"


@pytest.mark.parametrize("mode", USUAL)
@pytest.mark.parametrize("method", METHODS)
def test_host_time(benchmark, method, mode):
    found = measure(method, mode)
    benchmark.extra_info.update({name: round(value, 1) for name, value in found.items()})
    benchmark.extra_info["target"] = TARGETS[mode].get(method, USUAL[mode])
    print("\n" + line(method, mode, found))
    benchmark.pedantic(lambda: None, rounds=1)
    assert found["accelerated"] <= LIMIT * found["PEFT"] and found["ours"] <= LIMIT * found["PEFT"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_host", description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args()
    print(HEAD)
    for name in options.methods:
        for mode in USUAL:
            print(line(name, mode, measure(name, mode, options.turns, options.calls, options.device)), flush=True)
