"""An accelerated PEFT model under FSDP1 (accelerate's default), two processes on the CPU: PEFT's numbers, and no
gradient for what is frozen.

The views that FSDP1 gives to a forward inherit the flat parameter's `requires_grad`: the frozen weight looks trained.
"""

from __future__ import annotations

import functools

import pytest
import torch
from processes import in_two_processes

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS, MICRO_BATCHES, LAYERS = 2, 2, 14
ORIGINAL = {"use_orig_params": True}
CASES = {  # method, how FSDP wraps, its arguments, whether accelerate() comes before it
    "lora in one unit": ("lora", "all", ORIGINAL, True),
    "dora, accelerated after": ("dora", "blocks", ORIGINAL, False),
    "miss": ("miss", "blocks", ORIGINAL, True),
    "bat": ("miss_bat", "blocks", ORIGINAL, True),
    "PEFT's policy": ("lora", "peft", ORIGINAL, True),
    "PEFT's policy, uniform units": ("lora", "peft", {"use_orig_params": False}, False),
}


def wrapped(model, wrap: str, arguments: dict):
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = {
        "all": None,
        "blocks": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        "peft": fsdp_auto_wrap_policy(model),
    }[wrap]
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **arguments)


def train(rank: int, model) -> dict:
    from peft_tiny import loss_of, tokens

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    numbers = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            loss = loss_of(model, tokens(seed=10 * step + 2 * micro + rank))
            loss.backward()
            numbers.append(loss.item())
        flat = [h.flat_param for m in model.fsdp_modules(model) if (h := m._handle) is not None]
        computed = sum(p.grad.count_nonzero().item() for p in flat if p.grad is not None)
        numbers.append(model.clip_grad_norm_(1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"numbers": numbers, "computed": computed}


def compare(rank: int) -> dict:
    from peft_tiny import adapted

    import spectral_ops

    results = {}
    for case, (method, wrap, arguments, before) in CASES.items():
        expected = train(rank, wrapped(adapted(method, base_bias=True), wrap, arguments))
        model = adapted(method, base_bias=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if before:
            planned = spectral_ops.accelerate(model)
        model = wrapped(model, wrap, arguments)
        if not before:
            planned = spectral_ops.accelerate(model)
        counts = planned.counts
        got = train(rank, model)
        report = spectral_ops.report(model)
        reasons = [reason for reason, _, _ in report.grouped()]
        results[case] = {
            "expected": expected, "got": got, "planned": counts, "counts": report.counts, "reasons": reasons,
            "trained": trained,
        }  # fmt: skip
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_two_processes(compare, tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("case", CASES)
def test_training_agrees_with_peft(case, results):
    for rank in results:
        assert rank[case]["got"]["numbers"] == pytest.approx(rank[case]["expected"]["numbers"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_fused_and_frozen_weights_get_no_gradient(case, results):
    for rank in results:
        one = rank[case]
        assert one["counts"] == {"fused": LAYERS, "fused (base-agnostic)": 0, "PEFT": 0} and one["reasons"] == []
    elements = sum(rank[case]["trained"] for rank in results) // 2  # both ranks build the whole model
    got, stock = (sum(rank[case][which]["computed"] for rank in results) for which in ("got", "expected"))
    assert elements / 2 < got
    if case == "bat" or case.startswith("PEFT's policy"):  # where PEFT computes none either
        assert got == stock
    else:  # PEFT computes them, and FSDP1 throws them away
        assert got < 0.7 * stock


def test_before_the_first_call_a_sharded_layer_is_undecided(results):
    for case in ("dora, accelerated after", "PEFT's policy, uniform units"):
        counts = results[0][case]["planned"]
        assert counts["decided at the first call"] == LAYERS and counts["PEFT"] == 0
