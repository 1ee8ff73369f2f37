"""What ``accelerate`` promises of every tuner in ``spectral_ops.bench.tuners.TUNERS``: PEFT's numbers, gradients, files
and merges, nothing of the weight's size held or made, and PEFT's own forward, with a reason, where it does not fit."""

import copy
import json
import pickle

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from instruments import allocations, saved_tensors  # noqa: E402
from peft_tiny import errors, llama, logits_and_gradients, perturb, tokens, worst  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops import accelerate, restore  # noqa: E402
from spectral_ops.bench.tuners import TUNERS  # noqa: E402

TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
EXACT, BFLOAT16 = 5e-6, 2.0**-8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=TUNERS)
def tuner(request):
    if not TUNERS[request.param].there():
        pytest.skip(f"this PEFT has no {TUNERS[request.param].config}")
    return TUNERS[request.param]


def adapted(tuner, dtype=torch.float32, *, base_bias=False, autocast=True, targets=TARGETS, **fields):
    torch.manual_seed(1)
    config = tuner.build(targets, **{**tuner.small, **fields})
    return perturb(peft.get_peft_model(llama(dtype, base_bias), config, autocast_adapter_dtype=autocast)).train()


def pair(model):
    return model, copy.deepcopy(model)


def fused(model, *, n=10):
    report = accelerate(model, strict=True)
    assert report.counts["PEFT"] == 0 and sum(report.counts.values()) == n, str(report)
    return report


@pytest.mark.parametrize("base_bias", [False, True])
def test_outputs_and_gradients(tuner, base_bias):
    plain, ours = pair(adapted(tuner, base_bias=base_bias))
    report = fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert not report.fallbacks() and all(row.calls for row in report.rows), str(report)
    with torch.no_grad():
        assert worst({"logits": plain(tokens()).logits}, {"logits": ours(tokens()).logits}) < EXACT


def test_float64(tuner):
    plain, ours = pair(adapted(tuner).double())
    fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < 1e-12


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_bfloat16(tuner, adapter):
    """At most twice as far from float64 as PEFT is when all of it is bfloat16."""
    plain, ours = pair(adapted(tuner, torch.bfloat16, autocast=adapter == "float32"))
    oracle = logits_and_gradients(copy.deepcopy(ours).double(), tokens())
    accelerate(ours)
    theirs = errors(oracle, logits_and_gradients(plain.bfloat16(), tokens()))
    for name, error in errors(oracle, logits_and_gradients(ours, tokens())).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


def test_autocast(tuner):
    plain, ours = pair(adapted(tuner))
    oracle = logits_and_gradients(copy.deepcopy(ours).double(), tokens())
    accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, got = (logits_and_gradients(m, tokens()) for m in (plain, ours))
    assert {n: t.dtype for n, t in theirs.items() if t is not None} == {
        n: t.dtype for n, t in got.items() if t is not None
    }
    theirs = errors(oracle, theirs)
    for name, error in errors(oracle, got).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


def test_files_and_restore(tuner, tmp_path):
    plain, ours = pair(adapted(tuner))
    fused(ours)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for model, folder in ((plain, "plain"), (ours, "ours")):
        model.save_pretrained(tmp_path / folder)
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("plain", "ours")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in any order
    assert configs[0] == configs[1]
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    accelerate(loaded, strict=True)
    with torch.no_grad():
        assert worst({"y": plain.eval()(tokens()).logits}, {"y": loaded(tokens()).logits}) < EXACT
    again = pickle.loads(pickle.dumps(ours))
    restore(ours)
    assert [type(m) for m in plain.modules()] == [type(m) for m in ours.modules()]
    with torch.no_grad():
        assert worst({"y": plain(tokens()).logits}, {"y": again.eval()(tokens()).logits}) < EXACT


def test_training_stays_together(tuner):
    plain, ours = pair(adapted(tuner))
    fused(ours)
    losses = []
    for model in (plain, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        losses.append([])
        for seed in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (plain, ours)]
    assert worst(*[{n: p.detach() for n, p in t.items()} for t in trained]) < 1e-4


def test_merge_unmerge_and_disable(tuner):
    plain, ours = pair(adapted(tuner).eval())
    fused(ours)
    with torch.no_grad():
        before = ours(tokens()).logits
        for model in (plain, ours):
            model.merge_adapter()
        assert worst({"y": plain(tokens()).logits}, {"y": ours(tokens()).logits}) == 0
        for model in (plain, ours):
            model.unmerge_adapter()
        assert worst({"y": before}, {"y": ours(tokens()).logits}) < 1e-4
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(plain(tokens()).logits, ours(tokens()).logits)
        merged = [model.merge_and_unload()(tokens()).logits for model in (plain, ours)]
    assert torch.equal(*merged)


def test_a_second_adapter(tuner):
    """Alone, and beside the first where the tuner takes two at once: fused, or PEFT's forward with a reason."""
    model = adapted(tuner)
    try:
        model.add_adapter("other", tuner.build(TARGETS, **tuner.small))
    except ValueError as refused:
        pytest.skip(f"PEFT takes no second adapter of this kind: {refused}")
    perturb(model)
    plain, ours = pair(model)
    accelerate(ours)
    for active in ("other", ["default", "other"], "default"):
        for m in (plain, ours):
            m.base_model.set_adapter(active)
            perturb(m, 0.0)
        assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT, active
    report = spectral_ops.report(ours)
    assert all(f.reason for f in report.fallbacks())


def test_frozen_parameters_and_checkpointing(tuner):
    plain, ours = pair(adapted(tuner))
    fused(ours)
    for model in (plain, ours):
        for p in [p for p in model.parameters() if p.requires_grad][::2]:
            p.requires_grad_(False)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    for model in (plain, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


@pytest.mark.slow
def test_compiled(tuner):
    plain, ours = pair(adapted(tuner, targets=["q_proj", "down_proj"]))
    fused(ours, n=4)
    layer, theirs = (m.base_model.model.model.layers[0].mlp.down_proj for m in (ours, plain))
    x = torch.randn(3, 48)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x), theirs(x)
    assert worst({"y": expected.detach()}, {"y": got.detach()}) < EXACT
    for y in (got, expected):
        y.sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, layer)]
    assert worst(*grads) < 2e-5


def test_nothing_of_the_weights_size_is_held_or_made(tuner):
    """Few tokens over many features: every tensor [d, k] or [k, k] is larger than all of [T, d] together."""
    torch.manual_seed(0)
    n, T = 256, 8
    base = torch.nn.Sequential(torch.nn.Linear(n, n, bias=False))
    model = peft.get_peft_model(base, tuner.build(["0"]))
    perturb(model, 0.02)
    fused(model, n=1)
    x = torch.randn(T, n, requires_grad=True)

    def step():
        model(x).square().sum().backward()

    step()  # the scratch buffer has its size from here on
    with saved_tensors() as kept:
        model(x)
    known = {t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())}
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    beside = sum(size for address, size in held.items() if address not in known)
    assert beside <= 4 * T * tuner.saved + 4096, beside
    assert max(allocations(step)) < 4 * n * n
