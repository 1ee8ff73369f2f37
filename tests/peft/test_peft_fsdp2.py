"""An accelerated PEFT model under FSDP2 (`fully_shard`), two processes on the CPU: fused, and PEFT's numbers.

Unsharded weights come back in storage that `_version` says nothing about, and the optimizer steps on shards: DoRA's
norm must not outlive a step, and must be found again for the second micro-batch.
"""

from __future__ import annotations

import pytest
import torch
from processes import in_two_processes

peft = pytest.importorskip("peft")

STEPS, MICRO_BATCHES = 3, 2


def build(method: str):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    if method == "miss":
        config = peft.MissConfig(r=4, target_modules=["0", "2"])
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=method == "dora", init_lora_weights=False
        )
    return peft.get_peft_model(net, config)


def train(model) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)  # the same batches everywhere, so averaging gradients changes nothing
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            x, target = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
            loss = (model(x) - target).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def train_sharded(rank: int, method: str):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import spectral_ops

    mesh = init_device_mesh("cpu", (2,))
    model = build(method)
    report = spectral_ops.accelerate(model, strict=True)  # a call that fell back would raise
    for layer in model.base_model.model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model), len(report.fallbacks())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "miss"])
def test_sharded_training_is_fused_and_agrees_with_peft(method, tmp_path):
    expected = train(build(method))
    for losses, fallbacks in in_two_processes(train_sharded, tmp_path, method):
        assert fallbacks == 0
        assert losses == pytest.approx(expected, rel=1e-5)
