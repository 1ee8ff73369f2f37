"""AdaLoRA's schedule and files: PEFT's masks over a whole run, resuming, and triplets that are left out of a file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from instruments import Recorder
from models import adamw, mlp
from torch import nn

import spectral_ops as so
from spectral_ops import AdaLoRAConfig, AdaLoRALinear, AdaLoRASchedule

STEPS, K, D = 12, 18, 24
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS, "lora_alpha": 6}

pytestmark = pytest.mark.usefixtures("one_thread")


def attached(**fields):
    model = mlp(K, D, 0)
    torch.manual_seed(1)
    return so.attach(model, AdaLoRAConfig(**SCHEDULE | {"target_modules": ["0", "2"]} | fields))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, K, generator=generator), torch.randn(16, 12, generator=generator)


def train(model, optimizer, steps, each=None):
    for step in steps:
        x, target = batch(step)
        loss = nn.functional.mse_loss(model(x), target) + 0.1 * so.orthogonality_loss(model)
        loss.backward()
        optimizer.step()
        if each:
            each(step)
        optimizer.zero_grad()


def entries(model):
    return torch.cat([layer.lora_E["default"].detach().flatten() for layer in so.adapter_layers(model).values()])


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_budget():
    """b_T + (b₀ - b_T)(1 - (t - tinit) / (T - tfinal - tinit))³, from tinit on, by optimizer steps."""
    model = attached(deltaT=3)
    schedule = AdaLoRASchedule(model)
    budgets = [schedule.allocator.budget(t) for t in range(STEPS + 1)]
    assert budgets == [8, 8, 8] + [int(4 + 4 * (1 - (t - 2) / 7) ** 3) for t in range(3, 10)] + [4, 4, 4]
    assert [t for t in range(STEPS + 1) if schedule.allocator.allocates(t)] == [3, 6, 9]


def test_the_optimizer_s_steps_are_counted_and_pruned():
    model = attached()
    optimizer = adamw(model)
    schedule = AdaLoRASchedule(model, optimizer)
    zeros = []
    train(model, optimizer, range(STEPS), lambda step: zeros.append(int((entries(model) == 0).sum())))
    assert schedule.steps == STEPS
    assert zeros == [0, 0] + [8 - max(schedule.allocator.budget(t), 4) for t in range(3, 10)] + [4, 4, 4]
    pattern = so.adapter_configs(model)["default"].rank_pattern
    assert pattern == {f"{path}.lora_E": kept.tolist() for path, kept in schedule.keep.items()}
    assert torch.equal(torch.cat(list(schedule.keep.values())), entries(model) != 0)
    assert schedule.budget == 4 and schedule.allocator.exp_avg is None
    schedule.close()
    train(model, optimizer, [99])
    assert schedule.steps == STEPS


def test_nothing_waits_for_the_device_before_the_last_choice():
    model = attached()
    optimizer = adamw(model)
    schedule = AdaLoRASchedule(model)

    def update(step):
        if step == STEPS - 4:  # whose pattern is written down
            schedule.update()
            return
        with Recorder() as seen:
            schedule.update()
        names = {name.split(".")[1] for name, _ in seen.calls}
        assert not names & {"_local_scalar_dense", "is_nonzero", "nonzero", "item", "_to_copy"}, names
        own = [name for name, _ in seen.calls if name.startswith("spectral_ops")]
        assert len(own) <= 2, own

    train(model, optimizer, range(STEPS), update)


def test_a_run_cut_anywhere_goes_on_with_the_same_numbers(tmp_path):
    whole = attached()
    optimizer = adamw(whole)
    AdaLoRASchedule(whole, optimizer)
    train(whole, optimizer, range(STEPS))
    for cut in (1, 5, 9, 11):
        model = attached()
        optimizer = adamw(model)
        schedule = AdaLoRASchedule(model, optimizer)
        train(model, optimizer, range(cut))
        torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
        states = torch.load(tmp_path / "state", weights_only=True)
        model = attached()
        optimizer = adamw(model)
        schedule = AdaLoRASchedule(model, optimizer)
        for part, state in zip((model, optimizer, schedule), states, strict=True):
            part.load_state_dict(state)
        train(model, optimizer, range(cut, STEPS))
        for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b), (cut, name)
        assert so.adapter_configs(model) == so.adapter_configs(whole)


def test_a_layer_without_gradient_counts_as_zero_and_a_late_call_raises():
    model = attached()
    layers = so.adapter_layers(model)
    schedule = AdaLoRASchedule(model)
    model(batch(0)[0]).sum().backward()
    for key in ("lora_A", "lora_B", "lora_E"):
        getattr(layers["0"], key)["default"].grad = None
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_E["default"].fill_(1)
    schedule.update(3)
    assert not schedule.keep["0"].any()  # whose scores are all zero
    model.zero_grad()
    with pytest.raises(ValueError, match="got no gradient, wanted this called after optimizer.step"):
        schedule.update(4)


def test_target_r_of_all_prunes_nothing():
    model = attached(target_r=4)
    optimizer = adamw(model)
    schedule = AdaLoRASchedule(model, optimizer)
    train(model, optimizer, range(STEPS))
    assert (entries(model) != 0).all() and all(kept.all() for kept in schedule.keep.values())


def test_gradient_checkpointing_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    results = []
    for use in (False, True):
        model = attached(lora_dropout=0.3)
        optimizer = adamw(model)
        AdaLoRASchedule(model, optimizer)
        torch.manual_seed(4)
        for step in range(STEPS):
            x, target = batch(step)
            y = checkpoint(model, x, use_reentrant=False) if use else model(x)
            nn.functional.mse_loss(y, target).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: AdaLoRASchedule(mlp(K, D, 0)),
            r"adapter_name: got None, wanted the name of an AdaLoRA adapter \(\[\]\)",
        ),
        (
            lambda: AdaLoRASchedule(attached(), adapter_name="x"),
            r"got 'x', wanted .* AdaLoRA adapter \(\['default'\]\)",
        ),
        (lambda: AdaLoRASchedule(attached(), 3), r"optimizer: got int, wanted a torch\.optim\.Optimizer or None"),
        (lambda: AdaLoRASchedule(attached()).update(9), "step: got 9, the last choice, and no step before it"),
        (lambda: AdaLoRASchedule(attached()).update(10), "step: got 10 and no choice at 9, wanted every step in turn"),
    ],
)
def test_schedule_errors(function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": None}, r"AdaLoRAConfig\.total_step: got None \(NoneType\), wanted an integer"),
        ({"tinit": 9}, r"AdaLoRAConfig\.tinit: got 9, wanted less than total_step - tfinal \(9\)"),
        ({"target_r": 5}, r"target_r: got 5, wanted at most init_r \(4\)"),
        ({"init_r": 0}, r"init_r: got 0, wanted at least 1"),
        ({"deltaT": 0}, "deltaT: got 0, wanted at least 1"),
        ({"beta1": 1.0}, r"beta1: got 1\.0, wanted a number in \(0, 1\)"),
        ({"orth_reg_weight": -0.5}, r"orth_reg_weight: got -0\.5, wanted a number that is not negative"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, wanted a positive number"),
        ({"lora_dropout": 1.0}, r"lora_dropout: got 1\.0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', wanted True or False"),
        ({"rank_pattern": {"0.lora_E": [True]}}, r"rank_pattern: got {'0\.lora_E': \[True\]}, wanted None, or a dict"),
        ({"rank_pattern": [1]}, r"rank_pattern: got \[1\], wanted None, or a dict"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AdaLoRAConfig(**SCHEDULE | fields)


# --- files -----------------------------------------------------------------------------------------------------------


def trained(**fields):
    model = attached(**fields)
    optimizer = adamw(model)
    schedule = AdaLoRASchedule(model, optimizer)
    train(model, optimizer, range(STEPS))
    schedule.close()
    return model


def test_a_file_holds_the_triplets_that_are_left(tmp_path):
    from safetensors.torch import load_file

    model = trained()
    so.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {key.removesuffix(".lora_E"): sum(kept) for key, kept in fields["rank_pattern"].items()}
    assert sum(ranks.values()) == 4
    for path, r in ranks.items():
        shapes = [list(tensors[f"base_model.model.{path}.{key}"].shape) for key in ("lora_A", "lora_B", "lora_E")]
        layer = so.adapter_layers(model)[path]
        assert shapes == [[r, layer.in_features], [layer.out_features, r], [r, 1]]
    x, _ = batch(0)
    other = so.load_adapter(mlp(K, D, 0), tmp_path)
    torch.testing.assert_close(other(x), model(x))
    so.save_adapter(other, tmp_path / "again")  # as it came
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(t, again[key]) for key, t in tensors.items())
    so.save_adapter(model, tmp_path / "whole", plain=False)
    whole = so.load_adapter(mlp(K, D, 0), tmp_path / "whole")
    assert all(layer.lora_A["default"].shape[0] == 4 for layer in so.adapter_layers(whole).values())
    torch.testing.assert_close(whole(x), model(x))


def test_what_a_file_left_can_be_pruned_again(tmp_path):
    model = trained(target_r=3)
    so.save_adapter(model, tmp_path)
    first = so.adapter_configs(model)["default"].rank_pattern
    model = so.load_adapter(mlp(K, D, 0), tmp_path)
    for layer in so.adapter_layers(model).values():
        layer.configs["default"] = copy.copy(layer.configs["default"])
        layer.configs["default"].target_r = 1
    optimizer = adamw(model)
    AdaLoRASchedule(model, optimizer)
    train(model, optimizer, range(STEPS))
    second = so.adapter_configs(model)["default"].rank_pattern
    assert sum(map(sum, second.values())) == 2
    assert all(a or not b for key in first for a, b in zip(first[key], second[key], strict=True))
    so.save_adapter(model, tmp_path / "again")
    torch.testing.assert_close(so.load_adapter(mlp(K, D, 0), tmp_path / "again")(batch(0)[0]), model(batch(0)[0]))


def test_a_layer_without_triplets_is_its_base():
    layer = AdaLoRALinear.from_linear(nn.Linear(K, D), AdaLoRAConfig(**SCHEDULE))
    for key, shape in (("lora_A", (0, K)), ("lora_B", (D, 0)), ("lora_E", (0, 1))):
        getattr(layer, key)["default"] = nn.Parameter(torch.empty(shape))
    x, _ = batch(0)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.delta_weight().any()


# --- PEFT ------------------------------------------------------------------------------------------------------------


def peft_model(tiny, **fields):
    import peft

    torch.manual_seed(1)
    fields = {"target_modules": tiny.ATTENTION + tiny.MLP, "task_type": "CAUSAL_LM"} | fields  # else no regulariser
    config = peft.AdaLoraConfig(**SCHEDULE | fields)
    return peft.get_peft_model(tiny.llama(), config).train()


def ours(tiny, theirs, **fields):
    """Our adapter with PEFT's parameters."""
    config = AdaLoRAConfig(**SCHEDULE | {"target_modules": tiny.ATTENTION + tiny.MLP} | fields)
    model = so.attach(tiny.llama(), config)
    values = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    return model.train()


def test_outputs_gradients_and_masks_are_peft_s_over_the_whole_schedule(tiny):
    """Both train by themselves; PEFT's parameters are copied over before each step, so that only masks could differ."""
    theirs = peft_model(tiny, deltaT=2)
    tiny.perturb(theirs)
    model = ours(tiny, theirs, deltaT=2)
    schedule = AdaLoRASchedule(model)
    mine, peers = (adamw(m) for m in (model, theirs))
    values = dict(theirs.base_model.model.named_parameters())
    choices = 0
    for step in range(1, STEPS + 1):
        ids = tiny.tokens(seed=step)
        want = theirs(input_ids=ids, labels=ids)
        loss = tiny.loss_of(model, ids) + 0.5 * so.orthogonality_loss(model)
        torch.testing.assert_close(loss, want.loss, rtol=1e-5, atol=1e-5)
        loss.backward()
        want.loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, values[name].grad, rtol=1e-4, atol=1e-6)
                p.grad.copy_(values[name].grad)
        mine.step()
        peers.step()
        schedule.update()
        theirs.base_model.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern and schedule.keep is not None:
            scores = schedule.allocator.scores.sort().values
            if (gap := scores[schedule.allocator.count] / scores[schedule.allocator.count - 1]) > 1 + 1e-6:
                kept = {f"{path}.lora_E.default": k.tolist() for path, k in schedule.keep.items()}
                assert kept == pattern, (step, gap)
                choices += schedule.allocator.allocates(step)
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p, values[name], rtol=1e-4, atol=1e-5)
                p.data.copy_(values[name])
        mine.zero_grad()
        peers.zero_grad()
    assert choices >= 4
    frozen = so.adapter_configs(model)["default"].rank_pattern
    assert {f"{key}.default": kept for key, kept in frozen.items()} == pattern


def test_peft_reads_our_file_and_we_read_peft_s(tiny, tmp_path):
    import peft

    ids = tiny.tokens()
    theirs = tiny.perturb(peft_model(tiny))
    for step in range(1, STEPS + 1):
        tiny.loss_of(theirs, ids).backward()
        theirs.base_model.update_and_allocate(step)
        theirs.zero_grad()
    theirs.eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = so.load_adapter(tiny.llama(), tmp_path / "theirs").eval()
    want = theirs(ids).logits
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    so.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(back(ids).logits, want, rtol=1e-4, atol=1e-5)
    fresh = so.attach(tiny.llama(), AdaLoRAConfig(**SCHEDULE, target_modules=["q_proj"]))
    so.save_adapter(tiny.perturb(fresh), tmp_path / "fresh")
    back = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "fresh").eval()
    torch.testing.assert_close(back(ids).logits, fresh.eval()(ids).logits, rtol=1e-4, atol=1e-5)
