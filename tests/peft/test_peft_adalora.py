"""PEFT's AdaLoRA under accelerate(): layers, rank allocation and regulariser, and the way back."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import torch
from models import adamw
from processes import in_two_processes

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_tiny as tiny  # noqa: E402
import yaml  # noqa: E402  (PEFT needs it)
from peft.tuners.adalora import RankAllocator  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops.integrations.peft_adalora import (  # noqa: E402
    FusedAdaLoraModel,
    PendingConfig,
    contents,
    postpone,
)

STEPS = 10
pytestmark = pytest.mark.usefixtures("one_thread")


def built(base=None, **fields):
    settings = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": STEPS, "lora_alpha": 6, "deltaT": 2}
    settings |= {"target_modules": tiny.ATTENTION + tiny.MLP, "task_type": "CAUSAL_LM"} | fields
    torch.manual_seed(1)
    return tiny.perturb(peft.get_peft_model(tiny.llama() if base is None else base, peft.AdaLoraConfig(**settings)))


def pair(**fields):
    theirs, ours = tiny.pair(built(**fields).train())
    report = spectral_ops.accelerate(ours, strict=True)
    return theirs, ours, report


def train(model, steps, optimizer=None, each=None):
    optimizer = optimizer or adamw(model)
    losses = []
    for step in steps:
        ids = tiny.tokens(seed=step)
        loss = tiny.loss_of(model, ids)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        if each:
            each(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pattern_of(model):
    return model.peft_config["default"].rank_pattern


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_outputs_and_gradients(dtype):
    theirs, ours, report = pair(base=tiny.llama(dtype, bias=True))
    assert report.counts["fused"] == 14 and {row.method for row in report.rows} == {"AdaLoRA"}
    assert {row.operators for row in report.rows} == {"lowrank_linear"} and "regulariser: fused" in str(report)
    ids = tiny.tokens()
    want, got = (tiny.logits_and_gradients(model, ids) for model in (theirs, ours))
    if dtype == torch.float32:
        assert tiny.worst(want, got) < 1e-5
    else:  # both round on their way; ours is no further from the float32 model than PEFT's
        exact = tiny.logits_and_gradients(theirs.float(), ids)
        mean = [sum(tiny.errors(exact, results).values()) for results in (got, want)]
        assert mean[0] <= 1.1 * mean[1]
        assert all(t.dtype == want[name].dtype for name, t in got.items())
    assert not report.fallbacks()


def test_a_number_of_triplets_that_trains():
    """PEFT makes a parameter that trains of every ranknum it casts, those of all half-precision models."""
    models = tiny.pair(built().train())
    for model in models:
        for name, p in model.named_parameters():
            if "ranknum" in name:
                p.requires_grad_()
    theirs, ours = models
    spectral_ops.accelerate(ours, strict=True)
    for _ in range(2):
        want, got = (tiny.logits_and_gradients(model, tiny.tokens()) for model in models)
        assert sum("ranknum" in name for name in got) == 14
        assert tiny.worst(want, got) < 1e-5
        with torch.no_grad():
            for model in models:
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad


def test_dropout_has_the_law_of_peft_s():
    theirs, ours, _ = pair(lora_dropout=0.4)
    ids = tiny.tokens()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
    for model in (theirs, ours):
        model.eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.enable_input_require_grads()
    torch.manual_seed(2)
    want = tiny.loss_of(ours, ids)
    want.backward()
    first = [p.grad.clone() for p in ours.parameters() if p.requires_grad]
    ours.zero_grad()
    ours.gradient_checkpointing_disable()
    torch.manual_seed(2)
    tiny.loss_of(ours, ids).backward()
    for a, b in zip(first, (p.grad for p in ours.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_conv1d_disabled_adapters_and_merging():
    model = built(tiny.gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True).eval()
    theirs, ours = tiny.pair(model)
    spectral_ops.accelerate(ours, strict=True)
    ids = tiny.tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    for m in (theirs, ours):
        m.merge_adapter()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_layers_whose_ranks_were_resized(tmp_path):
    """A file has each layer's own rank, some of them 0, and keeps the scaling of the first one."""
    theirs = built().train()
    train(theirs, range(1, STEPS + 1))
    theirs.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    ids = tiny.tokens()
    want = loaded(ids).logits
    report = spectral_ops.accelerate(loaded, strict=True)
    torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert not report.fallbacks()


def test_the_regulariser_is_peft_s():
    theirs, ours, _ = pair()
    ids = tiny.tokens()
    want, got = (model(input_ids=ids, labels=ids) for model in (theirs, ours))
    plain = ours.base_model.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.loss - plain, 0.5 * spectral_ops.orthogonality_loss(ours))
    assert got.loss - plain > 0.1
    theirs.peft_config["default"].orth_reg_weight = ours.peft_config["default"].orth_reg_weight = 0.0
    torch.testing.assert_close(ours(input_ids=ids, labels=ids).loss, plain)
    ours.peft_config["default"].orth_reg_weight = -1
    with pytest.raises(ValueError, match="orth_reg_weight"):
        ours(input_ids=ids, labels=ids)


# --- allocation ------------------------------------------------------------------------------------------------------


def test_masks_patterns_and_losses_of_a_whole_run(tmp_path):
    theirs, ours, report = pair()
    patterns = []
    wanted = train(theirs, range(1, STEPS + 1), each=lambda _: patterns.append(copy.deepcopy(pattern_of(theirs))))
    got = train(ours, range(1, STEPS + 1), each=lambda step: compare(pattern_of(ours), patterns[step - 1]))
    assert got == pytest.approx(wanted, rel=1e-4)
    assert sum(p is not None for p in patterns) >= 6 and patterns[-1] != patterns[2]
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if "lora_E" in name:
            assert torch.equal(a == 0, b == 0), name
    assert not report.fallbacks()
    for model, folder in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / folder)
    texts = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("theirs", "ours")]
    saved = [json.loads(text)["rank_pattern"] for text in texts]
    assert saved[0] == saved[1] and len(saved[0]) == 14


def compare(got, want):
    assert (got is None) == (want is None)
    if want is not None:
        assert got == want and dict(got.items()) == want and list(got) == list(want)


def fields_of(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def saved(config):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "adapter_config.json").read_text())


READERS = {
    "attribute": lambda c: c.rank_pattern,
    "to_dict": lambda c: c.to_dict()["rank_pattern"],
    "asdict": lambda c: dataclasses.asdict(c)["rank_pattern"],
    "replace": lambda c: dataclasses.replace(c, total_step=9).rank_pattern,
    "fields": lambda c: fields_of(c)["rank_pattern"],
    "vars": lambda c: vars(c)["rank_pattern"],
    "dict(**)": lambda c: dict(**c.__dict__)["rank_pattern"],
    "deepcopy": lambda c: copy.deepcopy(c).rank_pattern,
    "copy": lambda c: copy.copy(c).rank_pattern,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)).rank_pattern,
    "pickle in Python": lambda c: pickle.loads(pickle._dumps(c)).rank_pattern,
    "json": lambda c: json.loads(json.dumps(c.to_dict(), default=list))["rank_pattern"],
    "yaml": lambda c: yaml.unsafe_load(yaml.dump(c)).rank_pattern,
    "save_pretrained": lambda c: saved(c)["rank_pattern"],
    "repr": lambda c: ast.literal_eval(re.search(r" rank_pattern=({.*?})", repr(c)).group(1)),
    "hidden in a dict": lambda c: copy.deepcopy({"peft_config": {"default": c}})["peft_config"]["default"].rank_pattern,
}


def test_a_pattern_is_read_only_when_looked_at_and_by_everybody():
    """No step waits for the device, and no reader, however it reads, finds the pattern of an earlier choice."""
    theirs, ours, _ = pair()
    train(theirs, range(1, 5))
    config, seen, optimizer = ours.peft_config["default"], [], adamw(ours)
    train(ours, range(1, 4), optimizer, each=lambda step: seen.append(type(config)))
    assert seen == [peft.AdaLoraConfig, PendingConfig, PendingConfig]
    config.rank_pattern = {"stale": [True]}
    assert type(config) is peft.AdaLoraConfig and config.rank_pattern == {"stale": [True]}
    train(ours, [4], optimizer)
    assert type(config) is PendingConfig and isinstance(config, peft.AdaLoraConfig)
    assert not isinstance(config, peft.PromptTuningConfig) and type(config) is PendingConfig  # asked in every step
    allocator, names = ours.base_model._spectral_ops_allocator, ours.base_model._names("lora_E")
    wanted = pattern_of(theirs)
    for name, read in READERS.items():
        contents(config)["rank_pattern"] = None
        postpone(config, allocator, names)
        got = read(config)
        assert got == wanted and (type(got), type(config)) == (dict, peft.AdaLoraConfig), name
    other = copy.deepcopy(config)
    postpone(config, allocator, names)
    postpone(other, allocator, names)
    assert config == other and other == config and config.__class__ is peft.AdaLoraConfig


def test_a_config_class_of_somebody_s_is_read_at_once():
    class Config(peft.AdaLoraConfig):
        pass

    theirs, ours, _ = pair()
    config = ours.peft_config["default"]
    config.__class__ = Config
    train(theirs, range(1, 5))
    train(ours, range(1, 5))
    assert contents(config)["rank_pattern"] == pattern_of(theirs) and type(config) is Config


@pytest.mark.parametrize("cut", [3, 8])
@pytest.mark.parametrize("held_before", [True, False], ids=["PEFT's", "ours"])
def test_bound_methods_that_outlive_the_swap(held_before, cut):
    """update_and_allocate and forward held from before accelerate(), or from before restore(), give the same run."""
    plain = built().train()
    wanted = train(plain, range(1, STEPS + 1))
    model = built().train()
    optimizer, tuner = adamw(model), model.base_model
    if not held_before:
        spectral_ops.accelerate(model)
    update, forward, losses = tuner.update_and_allocate, tuner.forward, []
    for step in range(1, STEPS + 1):
        if step == cut:
            (spectral_ops.accelerate if held_before else spectral_ops.restore)(model)
        ids = tiny.tokens(seed=step)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(wanted, rel=1e-4) and pattern_of(model) == pattern_of(plain)
    spectral_ops.restore(model)
    assert type(tuner.rankallocator) is RankAllocator and not hasattr(tuner.rankallocator, "_spectral_ops")


@pytest.mark.parametrize("cut", [3, 8])
def test_accelerate_and_restore_in_the_middle_of_a_run(cut):
    """PEFT, then ours, then PEFT again: the running importance goes along."""
    plain = built().train()
    wanted = train(plain, range(1, STEPS + 1))
    model = built().train()
    optimizer = adamw(model)
    losses = train(model, range(1, cut), optimizer)
    spectral_ops.accelerate(model)
    assert type(model.base_model) is FusedAdaLoraModel
    losses += train(model, range(cut, cut + 2), optimizer)
    spectral_ops.restore(model)
    assert type(model.base_model) is peft.AdaLoraModel and type(pattern_of(model)) in (dict, type(None))
    assert not [n for n in vars(model.base_model) if "spectral" in n]
    losses += train(model, range(cut + 2, STEPS + 1), optimizer)
    assert losses == pytest.approx(wanted, rel=1e-4) and pattern_of(model) == pattern_of(plain)


def test_copies_have_an_allocator_of_their_own():
    _, ours, _ = pair()
    train(ours, range(1, 4))
    other = copy.deepcopy(ours)
    assert other.base_model._spectral_ops_allocator is not ours.base_model._spectral_ops_allocator
    before = ours.base_model._spectral_ops_allocator.exp_avg.clone()
    a = train(other, range(4, STEPS + 1))
    assert torch.equal(ours.base_model._spectral_ops_allocator.exp_avg, before)
    b = train(ours, range(4, STEPS + 1))
    assert a == pytest.approx(b, rel=1e-5) and pattern_of(other) == pattern_of(ours)


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))


def sharded_run(model, update, loss_extra=lambda: 0.0):
    """Losses and, after every step, the pattern of kept triplets."""
    optimizer = adamw(model)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(1, STEPS + 1):
        x, target = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
        loss = (model(x) - target).square().mean() + loss_extra()
        loss.backward()
        optimizer.step()
        update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of_peft():
    fields = {"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": STEPS, "target_modules": ["0", "2"]}
    torch.manual_seed(1)
    return tiny.perturb(peft.get_peft_model(net(), peft.AdaLoraConfig(**fields)))


def of_ours():
    fields = {"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": STEPS, "target_modules": ["0", "2"]}
    torch.manual_seed(1)
    return tiny.perturb(spectral_ops.attach(net(), spectral_ops.AdaLoRAConfig(**fields)))


def run(kind, model, shard=lambda model, layers: None):
    if kind == "peft":
        spectral_ops.accelerate(model, strict=True)
        shard(model, model.base_model.model)
        losses = sharded_run(model, model.base_model.update_and_allocate)
        return losses, {k.replace(".lora_E.default", ""): v for k, v in pattern_of(model).items()}
    shard(model, model)
    schedule = spectral_ops.AdaLoRASchedule(model)
    losses = sharded_run(model, schedule.update, lambda: 0.1 * spectral_ops.orthogonality_loss(model))
    return losses, {path: kept.tolist() for path, kept in schedule.keep.items()}


def run_sharded(rank, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def shard(model, layers):
        for layer in layers:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return run(kind, of_peft() if kind == "peft" else of_ours(), shard)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", pytest.param("ours", marks=pytest.mark.thorough)])
def test_sharded_parameters_are_pruned_alike_on_all_ranks(kind, tmp_path):
    losses, pattern = run(kind, of_peft() if kind == "peft" else of_ours())
    results = in_two_processes(run_sharded, tmp_path, kind)
    assert results[0][1] == results[1][1] == pattern and sum(map(sum, pattern.values())) == 4
    for got, _ in results:
        assert got == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    plain, ours, _ = pair()
    compiled = torch.compile(ours.base_model.model, backend="aot_eager", fullgraph=True)
    x = tiny.tokens()
    torch.testing.assert_close(compiled(x).logits, plain(x).logits, rtol=1e-4, atol=1e-5)
