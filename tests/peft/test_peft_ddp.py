"""An accelerated PEFT model under DistributedDataParallel, two processes on the CPU: fused, in stock PEFT's numbers."""

from __future__ import annotations

import pytest
import torch
from processes import in_two_processes

pytest.importorskip("peft")

from peft import get_peft_model_state_dict  # noqa: E402
from peft_tiny import adapted, loss_of, perturb, tokens  # noqa: E402

STEPS = 3
WRAPPERS = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
}
CHECKPOINTS = {"none": None, "reentrant": True, "not reentrant": False}


def run(rank: int, method: str, options: dict, reentrant: bool | None, accelerated: bool) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    import spectral_ops

    model = adapted(method)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    if accelerated:
        spectral_ops.accelerate(model, strict=True)
    wrapped = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        ids = tokens(seed=10 * step + rank)  # each process has its own batch
        loss = loss_of(wrapped, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = {"losses": losses, "file": get_peft_model_state_dict(model)}
    if accelerated:
        report = spectral_ops.report(wrapped)
        found |= {"counts": report.counts, "shared": bool(report.shared())}
    return found


def through_a_checkpoint(rank: int, folder: str) -> bool:
    """torch.distributed.checkpoint: saved by an accelerated model under DDP, read by a stock one without, and back."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.nn.parallel import DistributedDataParallel

    import spectral_ops

    ours, stock = adapted("dora"), perturb(adapted("dora"))
    spectral_ops.accelerate(ours, strict=True)
    wrapped = DistributedDataParallel(ours)
    logits = []
    for source, target in ((wrapped, stock), (stock, wrapped)):
        dcp.save(get_model_state_dict(source), checkpoint_id=f"{folder}/checkpoint-{len(logits)}")
        perturb(target.module if target is wrapped else target)
        assert not torch.allclose(source(tokens()).logits, target(tokens()).logits)
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint-{len(logits)}")
        set_model_state_dict(target, state)
        logits.append(torch.allclose(source(tokens()).logits, target(tokens()).logits, rtol=1e-4, atol=1e-5))
    return all(logits)


def cases(rank: int, folder: str) -> tuple[dict, bool]:
    from spectral_ops.integrations import peft_siblings

    torch.manual_seed(0)
    found = {}
    peft_siblings.LEAST["cpu"] = 1  # q, k and v share a projection, as they do on a GPU
    for method in ("lora", "dora", "miss"):
        for wrapper, options in WRAPPERS.items():
            for checkpoint, reentrant in CHECKPOINTS.items():
                if reentrant and wrapper == "unused parameters":
                    continue  # DDP refuses it: a parameter would be marked ready twice
                key = method, wrapper, checkpoint
                found[key] = [run(rank, method, options, reentrant, accelerated) for accelerated in (False, True)]
    return found, through_a_checkpoint(rank, folder)


@pytest.mark.slow
def test_under_ddp_fused_in_the_numbers_of_stock_peft(tmp_path):
    both, checkpoints = zip(*in_two_processes(cases, tmp_path, str(tmp_path)), strict=True)
    assert all(checkpoints)
    for found in both:
        for key, (stock, ours) in found.items():
            assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5), key
            for name, tensor in stock["file"].items():
                torch.testing.assert_close(ours["file"][name], tensor, rtol=1e-3, atol=2e-5, msg=f"{key} {name}")
            assert ours["counts"] == {"fused": 14, "fused (base-agnostic)": 0, "PEFT": 0}, key
            assert ours["shared"] == (key[0] == "lora"), key
    for key in both[0]:
        first, second = (found[key][1]["file"] for found in both)
        assert all(torch.equal(first[name], second[name]) for name in first), key  # the processes stay together
