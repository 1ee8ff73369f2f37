"""An accelerated PEFT model under FSDP2 (`fully_shard`), two processes on the CPU: fused, in stock PEFT's numbers.

Unsharded weights come back in storage that `_version` says nothing about, and the optimizer steps on shards: DoRA's
norm must not outlive a step, and must be found again for the second micro-batch.
"""

from __future__ import annotations

import pytest
import torch
from processes import in_two_processes

peft = pytest.importorskip("peft")

STEPS, MICRO_BATCHES = 3, 2
METHODS = ["lora", "dora", "miss"]


def build(method: str, dtype: torch.dtype = torch.float32):
    """Adapters are made in float32 over whatever base."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)).to(dtype)
    if method == "miss":
        config = peft.MissConfig(r=4, target_modules=["0", "2"])
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["0", "2"], use_dora=method == "dora", init_lora_weights=False
        )
    return peft.get_peft_model(net, config)


def train(model, dtype: torch.dtype = torch.float32) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)  # the same batches everywhere, so averaging gradients changes nothing
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            x, target = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
            loss = (model(x.to(dtype)).float() - target).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def shard(model, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def adapter_file(model) -> dict[str, torch.Tensor]:
    """What would be saved, whole, from every process's shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return peft.get_peft_model_state_dict(model, state_dict=whole)


def one(method: str, dtype: torch.dtype, options: dict, accelerated: str) -> dict:
    import spectral_ops

    model = build(method, dtype)
    found = {}
    if accelerated == "before":
        found["before"] = spectral_ops.accelerate(model, strict=True).counts  # a call that fell back would raise
    shard(model, **options)
    if accelerated == "after":
        found["before"] = spectral_ops.accelerate(model, strict=True).counts
    found["losses"], found["file"] = train(model, dtype), adapter_file(model)
    if accelerated:
        found["after"] = spectral_ops.report(model).counts
        x = torch.ones(2, 16, dtype=dtype)
        ours, classes = model(x), []
        for change in (torch.nn.Module.train, spectral_ops.restore, spectral_ops.accelerate, spectral_ops.restore):
            change(model)
            classes.append([id(type(layer)) for layer in model.base_model.model])
        found["restored"], found["classes"] = (ours.detach(), model(x).detach()), classes
    return found


def precision(**dtypes) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(**dtypes)}


def cases(rank: int, folder: str) -> tuple[dict, dict]:
    torch.manual_seed(0)
    found = {}
    for method in METHODS:
        for when in ("", "before", "after"):
            found[method, "float32", when] = one(method, torch.float32, {}, when)
            found[method, "bfloat16 base", when] = one(method, torch.bfloat16, {}, when)
            mixed = precision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            found[method, "mixed precision", when] = one(method, torch.float32, mixed, when)
    return found, through_a_checkpoint("dora", folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything in one pair of processes: starting them costs more than what they do."""
    folder = tmp_path_factory.mktemp("processes")
    return in_two_processes(cases, folder, str(folder))


@pytest.mark.slow
def test_sharded_training_is_fused_and_agrees_with_peft(runs):
    alone = {method: train(build(method)) for method in METHODS}
    for found, _ in runs:
        for (method, kind, when), got in found.items():
            stock = found[method, kind, ""]
            exact = kind == "float32"
            if exact:
                assert got["losses"] == pytest.approx(alone[method], rel=1e-5)
            assert got["losses"] == pytest.approx(stock["losses"], rel=1e-5 if exact else 2.0**-7), (method, kind, when)
            assert got["file"].keys() == stock["file"].keys()
            for name, tensor in stock["file"].items():
                ours = got["file"][name]
                assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
                error = ((ours.double() - tensor.double()).norm() / tensor.double().norm()).item()
                assert error < (1e-5 if exact else 0.02), (method, kind, when, name, error)
            if when:
                assert got["after"] == {"fused": 2, "fused (base-agnostic)": 0, "PEFT": 0}
                planned = "fused" if when == "before" else "decided at the first call"
                assert got["before"][planned] == 2
                torch.testing.assert_close(*got["restored"], rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 0.02)
                assert got["classes"][0] == got["classes"][2] != got["classes"][1] == got["classes"][3]


# --- distributed checkpoints -----------------------------------------------------------------------------------------


def through_a_checkpoint(method: str, folder: str) -> dict:
    """Saved in shards by an accelerated model, read by a stock one in shards, and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    import spectral_ops

    ours = build(method)
    spectral_ops.accelerate(ours, strict=True)
    shard(ours)
    train(ours)
    dcp.save({"model": get_model_state_dict(ours)}, checkpoint_id=f"{folder}/ours")
    stock = shard(build(method))
    state = {"model": get_model_state_dict(stock)}
    dcp.load(state, checkpoint_id=f"{folder}/ours")
    set_model_state_dict(stock, state["model"])
    same = all(
        torch.equal(a, b) for a, b in zip(adapter_file(ours).values(), adapter_file(stock).values(), strict=True)
    )
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    first = (ours(x), stock(x))
    train(stock)  # on from there
    dcp.save({"model": get_model_state_dict(stock)}, checkpoint_id=f"{folder}/stock")
    state = {"model": get_model_state_dict(ours)}
    dcp.load(state, checkpoint_id=f"{folder}/stock")
    set_model_state_dict(ours, state["model"])
    return {"same": same, "outputs": [tuple(t.detach() for t in pair) for pair in (first, (ours(x), stock(x)))]}


@pytest.mark.slow
def test_distributed_checkpoints_go_both_ways(runs):
    for _, found in runs:
        assert found["same"]
        for ours, stock in found["outputs"]:
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found["outputs"][0][0], found["outputs"][1][0])
