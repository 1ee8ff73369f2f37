"""AdaLoRA: rank allocation over SmolLM2-135M's layers (30 x 7) beside PEFT's in one run; each operator of the row."""

import copy
import statistics
import time

import pytest
import torch
from torch import nn

from benchmarks import harness
from spectral_ops import accelerate

HIDDEN, KV, MLP, LAYERS, RANK, TARGET = 576, 192, 1536, 30, 12, 5.0
SHAPES = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN),
          "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}  # fmt: skip


def model():
    """PEFT's AdaLoRA over linear layers of those shapes, with random parameters and gradients."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({n: nn.Linear(k, d, bias=False) for n, (d, k) in SHAPES.items()}) for _ in range(LAYERS)]
    config = peft.AdaLoraConfig(init_r=RANK, target_r=8, total_step=1000, tfinal=10, target_modules=list(SHAPES))
    adapted = peft.get_peft_model(nn.ModuleDict({"layers": nn.ModuleList(blocks)}), config)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.add_(0.01 * torch.randn_like(p))
            p.grad = torch.randn_like(p)
    return adapted


@pytest.mark.parametrize("masks", [True, False], ids=["with a choice", "between choices"])
def test_update_and_allocate(benchmark, masks):
    """Medians of interleaved turns; a choice that differs from PEFT's fails."""
    theirs = model()
    ours = copy.deepcopy(theirs)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    accelerate(ours)
    for m in (theirs, ours):
        m.peft_config["default"].deltaT = 1 if masks else 10_000
    times = {id(theirs): [], id(ours): []}
    for step in range(1, 16):
        for m in (theirs, ours):
            start = time.perf_counter()
            m.base_model.update_and_allocate(step)
            times[id(m)].append(time.perf_counter() - start)
    patterns = [m.peft_config["default"].rank_pattern for m in (theirs, ours)]
    assert patterns[0] == patterns[1], "red: another choice than PEFT's"
    seconds = [statistics.median(times[id(m)][2:]) for m in (theirs, ours)]
    ratio = seconds[0] / seconds[1]
    benchmark.extra_info.update(peft_ms=1e3 * seconds[0], ours_ms=1e3 * seconds[1], ratio=ratio, target=TARGET)
    print(f"\nPEFT {1e3 * seconds[0]:.1f} ms, ours {1e3 * seconds[1]:.1f} ms: {ratio:.1f} times (target {TARGET:g})")
    steps = iter(range(16, 900))
    benchmark.pedantic(lambda: ours.base_model.update_and_allocate(next(steps)), rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("importance"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)
