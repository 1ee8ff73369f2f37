"""Accelerated models under DeepSpeed's ZeRO, two processes on the CPU: what ran, and PEFT's numbers.

With a threshold of 0 every parameter is partitioned outside the module that reads it, forward and backward: a tensor
saved for the backward is empty unless somebody gathers it again.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import pytest
import torch
from processes import in_two_processes

MISSING = [name for name in ("peft", "deepspeed", "datasets", "trl") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

STEPS, RATE = 6, 1e-2
WHOLE, PARTED = {"stage": 3}, {"stage": 3, "stage3_param_persistence_threshold": 0}
PREFETCHED = {
    **PARTED,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 1,
}  # on its way when it is wanted
LATER = "accelerated at step 4"
CASES = {  # method, ZeRO's settings, what else happens
    "LoRA, all partitioned": ("lora", PARTED, ""),
    "LoRA, small ones whole": ("lora", WHOLE, "accelerated after initialize"),
    "LoRA, accelerated while it trains": ("lora", PARTED, LATER),
    "LoRA, another adapter from step 4 on": ("lora", PARTED, "switched at step 4"),
    "DoRA, all partitioned": ("dora", PARTED, "checkpointed"),
    "DoRA, generating between steps": ("dora", PARTED, "generating"),
    "DoRA, accelerated while it is prefetched": ("dora", PREFETCHED, LATER),
    "MiSS, all partitioned": ("miss", PARTED, ""),
    "bat, all partitioned": ("miss_bat", PARTED, ""),
    "ZeRO-2": ("dora", {"stage": 2}, ""),
    "ZeRO-1": ("miss", {"stage": 1}, ""),
}


class Net(torch.nn.Module):
    def __init__(self, checkpointed: bool):
        super().__init__()
        self.up, self.act, self.down = torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)
        self.checkpointed = checkpointed

    def body(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)


def build(method: str, extra: str):
    import peft
    from peft_tiny import config, perturb

    torch.manual_seed(0)
    targets = {"target_modules": ["up", "down"], "r": 8 if method == "miss_bat" else 4}
    model = peft.get_peft_model(Net(extra == "checkpointed"), config(method, **targets))
    if extra.startswith("switched"):
        model.add_adapter("other", config(method, **targets))
        model.base_model.set_adapter(["default", "other"])  # so that both are trained
        perturb(model)
        model.set_adapter("default")
        model.base_model.set_requires_grad("other", True)
    return perturb(model)


def here(rank: int) -> None:
    """What DeepSpeed and accelerate want in the environment, and no compiler run for an operator that gloo replaces."""
    warnings.simplefilter("ignore")
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group is there
    import logging

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def generate(engine) -> float:
    """As TRL does it for GRPO: everything gathered, and DeepSpeed's hooks taken off meanwhile."""
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with torch.no_grad(), deepspeed.zero.GatheredParameters(engine.module.parameters()):
        remove_hooks(engine)
        result = engine.module(torch.ones(3, 16)).square().mean().item()
        add_hooks(engine)
    return result


def train(rank: int, method: str, zero: dict, extra: str, fused: bool):
    import deepspeed

    import spectral_ops

    model = build(method, extra)
    planned = None
    if fused and not extra.startswith("accelerated"):
        planned = spectral_ops.accelerate(model, strict=True).counts
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    settings = {
        "train_micro_batch_size_per_gpu": 5, "gradient_accumulation_steps": 2, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if fused and extra == "accelerated after initialize":
        planned = spectral_ops.accelerate(engine.module, strict=True).counts
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(STEPS):
        if fused and extra == f"accelerated at step {step}":
            planned = spectral_ops.accelerate(engine.module, strict=True).counts
        if extra == f"switched at step {step}":
            model.set_adapter("other")
        if extra == "generating":
            losses.append(generate(engine))
        x, target = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
        loss = (engine(x) - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if not fused:
        return losses, None, None
    with torch.no_grad():
        engine.eval()
        losses.append(engine(x).square().mean().item())
        report = spectral_ops.report(engine)
        spectral_ops.restore(engine)
        losses.append(engine(x).square().mean().item())
    return losses, planned, (report.counts, sum(row.calls for row in report.rows), report.grouped())


ZERO_3 = {  # as transformers recommends it: the threshold follows from the model's size
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


def with_trainer(folder) -> tuple:
    import peft
    from tiny import language_model, tokenizer
    from training import CONFIGS, arguments, texts
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from spectral_ops.integrations.transformers import SpectralOpsCallback

    words = tokenizer()
    data = texts(16).map(lambda row: words(row["text"]), remove_columns=["text"])
    collator = DataCollatorForLanguageModeling(words, mlm=False)

    def losses(where, *callbacks):
        # the arguments first: from then on transformers and PEFT know of ZeRO-3
        args = arguments(TrainingArguments, folder / where, deepspeed=dict(ZERO_3), gradient_accumulation_steps=2)
        torch.manual_seed(0)
        model = peft.get_peft_model(language_model(), CONFIGS["dora"]())
        trainer = Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=list(callbacks))
        trainer.train()
        trainer.save_model(str(folder / where))  # all gather, the first writes
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    callback = SpectralOpsCallback(strict=True)
    return losses("plain"), losses("fused", callback), callback.report.counts


def compare(rank: int, folder) -> tuple:
    """All of it in one pair of processes: starting them takes longer than any case."""
    here(rank)
    results = {}
    for case, (method, zero, extra) in CASES.items():
        expected, *_ = train(rank, method, zero, extra, False)
        results[case] = (expected, *train(rank, method, zero, extra, True))
    return results, with_trainer(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    return in_two_processes(compare, folder, folder), folder


@pytest.fixture(scope="module")
def results(both):
    return [results for results, _ in both[0]]


@pytest.mark.parametrize("case", CASES)
def test_every_call_is_fused_and_training_agrees_with_peft(case, results):
    for rank in results:
        expected, losses, planned, (counts, calls, fallbacks) = rank[case]
        *training, evaluated, restored = losses
        assert training == pytest.approx(expected, rel=1e-5)
        assert evaluated == pytest.approx(restored, rel=1e-5)
        assert counts == {"fused": 2, "fused (base-agnostic)": 0, "PEFT": 0} and not fallbacks
        extra = CASES[case][2]
        served = STEPS - 4 if extra == LATER else STEPS
        assert calls == 2 * ((2 if extra in ("checkpointed", "generating") else 1) * served + 1)
        assert planned["PEFT"] == 0


def test_a_partitioned_layer_is_undecided_before_its_call(results):
    planned = results[0]["DoRA, accelerated while it is prefetched"][2]
    assert planned["decided at the first call"] == 2


def test_through_transformers_trainer(both):
    from safetensors.torch import load_file

    ((_, (expected, losses, counts)), _), folder = both
    assert len(expected) == 3 and losses == pytest.approx(expected, rel=1e-5)
    assert counts == {"fused": 14, "fused (base-agnostic)": 0, "PEFT": 0}
    plain, fused = (load_file(folder / where / "adapter_model.safetensors") for where in ("plain", "fused"))
    assert plain.keys() == fused.keys() and len(plain) == 42
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
