"""Accelerated experts in two processes: fused, in the numbers of stock PEFT, under DDP and FSDP2; also under FSDP1, to
whose views the forward of PEFT cannot write."""

from __future__ import annotations

import pytest
import torch
from processes import in_two_processes

pytest.importorskip("transformers.integrations.moe")  # transformers 5
pytest.importorskip("peft")

from experts_tiny import adapted_mixture  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402
from peft_tiny import loss_of, perturb, tokens  # noqa: E402

STEPS = 2
FUSED = {"fused": 4, "fused (base-agnostic)": 0, "PEFT": 0}
FAMILIES = ["qwen3_moe", "gpt_oss", "llama4"]
DDP = {
    "plain": ({}, None),
    "static graph, reentrant": ({"static_graph": True}, True),
    "unused parameters, not reentrant": ({"find_unused_parameters": True}, False),
}
SHARDED = ["float32", "bfloat16 base", "mixed precision"]


def train(model: torch.nn.Module, trained: torch.nn.Module, rank: int) -> list[float]:
    """Each process has its own batches, in which different experts have rows."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, tokens(seed=10 * step + rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def replicated(rank: int, family: str, options: dict, reentrant: bool | None, accelerated: bool) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    import spectral_ops

    model = adapted_mixture(family)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    if accelerated:
        spectral_ops.accelerate(model, strict=True)
    found = {"losses": train(DistributedDataParallel(model, **options), model, rank)}
    found["file"] = {n: t.detach() for n, t in get_peft_model_state_dict(model).items()}
    return found | ({"counts": spectral_ops.report(model).counts} if accelerated else {})


def shard(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": init_device_mesh("cpu", (2,))}
    if kind == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.base_model.model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter file, from every process's shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {n: t.detach() for n, t in get_peft_model_state_dict(model, state_dict=state).items()}


def sharded(rank: int, family: str, kind: str, accelerated: str) -> dict:
    import spectral_ops

    model, found = adapted_mixture(family, dtype=torch.bfloat16 if kind == "bfloat16 base" else torch.float32), {}
    if accelerated == "before":
        found["planned"] = spectral_ops.accelerate(model, strict=True).counts
    shard(model, kind)
    if accelerated == "after":
        found["planned"] = spectral_ops.accelerate(model, strict=True).counts
    found |= {"losses": train(model, model, rank), "file": whole(model)}
    return found | ({"counts": spectral_ops.report(model).counts} if accelerated else {})


def flattened(rank: int, accelerated: str) -> dict:
    """FSDP1, a unit for each block."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    import spectral_ops

    model = adapted_mixture("qwen3_moe")
    if accelerated == "before":
        spectral_ops.accelerate(model, strict=True)
    policy = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    if accelerated == "after":
        spectral_ops.accelerate(model, strict=True)
    return {"losses": train(wrapped, wrapped, rank), "counts": spectral_ops.report(model).counts}


def through_a_checkpoint(folder: str) -> list[bool]:
    """torch.distributed.checkpoint: saved in shards by an accelerated model, read by a stock one, and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    import spectral_ops

    ours, stock = adapted_mixture("gpt_oss"), perturb(adapted_mixture("gpt_oss"))
    spectral_ops.accelerate(ours, strict=True)
    models, same = [shard(ours, "float32"), shard(stock, "float32")], []
    for source, target in (models, models[::-1]):
        train(source, source, 0)
        assert not torch.allclose(source(tokens()).logits, target(tokens()).logits)
        dcp.save(get_model_state_dict(source), checkpoint_id=f"{folder}/checkpoint-{len(same)}")
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint-{len(same)}")
        set_model_state_dict(target, state)
        same.append(torch.allclose(source(tokens()).logits, target(tokens()).logits, rtol=1e-4, atol=1e-5))
    return same


def cases(rank: int, folder: str) -> tuple[dict, list[dict], list[bool]]:
    torch.manual_seed(0)
    found = {}
    for family in FAMILIES:
        everything = family == "qwen3_moe"
        for name, (options, reentrant) in DDP.items() if everything else [("plain", DDP["plain"])]:
            found["DDP", family, name] = [replicated(rank, family, options, reentrant, a) for a in (False, True)]
        for kind in SHARDED if everything else SHARDED[:1]:
            found["FSDP2", family, kind] = [sharded(rank, family, kind, when) for when in ("", "before", "after")]
    return found, [flattened(rank, when) for when in ("before", "after")], through_a_checkpoint(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything in one pair of processes: starting them costs more than what they do."""
    folder = tmp_path_factory.mktemp("processes")
    return in_two_processes(cases, folder, str(folder))


@pytest.mark.slow
def test_training_is_fused_and_agrees_with_peft(runs):
    for found, *_ in runs:
        for key, (stock, *accelerated) in found.items():
            exact = key[2] not in ("bfloat16 base", "mixed precision")
            for ours, planned in zip(accelerated, ("fused", "decided at the first call"), strict=False):
                assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5 if exact else 2.0**-7), key
                assert ours["counts"] == FUSED, key
                assert key[0] == "DDP" or ours["planned"][planned] == 4, key
                assert ours["file"].keys() == stock["file"].keys() and len(ours["file"]) == 8
                for name, tensor in stock["file"].items():
                    got = ours["file"][name]
                    assert got.dtype == tensor.dtype and got.shape == tensor.shape
                    error = ((got.double() - tensor.double()).norm() / tensor.double().norm()).item()
                    assert error < (2e-3 if exact else 0.1), (key, name, error)
    for key in runs[0][0]:
        first, second = (found[key][1]["file"] for found, *_ in runs)
        assert all(torch.equal(first[name], second[name]) for name in first), key  # the processes stay together


@pytest.mark.slow
def test_under_fsdp1_the_losses_are_those_under_ddp(runs):
    for found, views, _ in runs:
        stock, _ = found["DDP", "qwen3_moe", "plain"]
        for ours in views:
            assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5) and ours["counts"] == FUSED


@pytest.mark.slow
def test_distributed_checkpoints_go_both_ways(runs):
    assert all(same == [True, True] for *_, same in runs)
