"""``accelerate`` computes what PEFT computes: outputs, every gradient, and twenty steps of training.

float32 is compared with PEFT directly: the same sums in another order, over at most 48 terms and two layers, stay
within EXACT of each other. In bfloat16 both round, at different places; so each is compared with the same model in
float64, and the fused one may be at most twice as far off as PEFT is when all of it is bfloat16 (plus one rounding).
With float32 adapters PEFT casts x up and rounds only the sum; the fused operators round the factors, as autocast does.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_tiny import (  # noqa: E402
    METHODS,
    adapted,
    config,
    errors,
    gpt2,
    logits_and_gradients,
    loss_of,
    pair,
    perturb,
    tokens,
    worst,
)

from spectral_ops import NormCache, accelerate  # noqa: E402

EXACT = 5e-6  # relative; float32's unit roundoff is 6e-8
BFLOAT16 = 2.0**-8
pytestmark = pytest.mark.usefixtures("one_thread")

methods = pytest.mark.parametrize("method", METHODS)


def fused(model, **expected):
    """Accelerate, and check that every adapter layer is on the path the test means to test."""
    report = accelerate(model, strict=True)
    assert report.counts == {"fused": 14, "fused (base-agnostic)": 0, "PEFT": 0, **expected}, str(report)
    return report


def assert_bfloat16_parity(model, ids):
    plain, ours = pair(model)
    got, oracle = logits_and_gradients(ours, ids), logits_and_gradients(pair(model)[1].double(), ids)
    dtypes = {name: g.dtype for name, g in got.items()}
    fused(ours)
    theirs = errors(oracle, logits_and_gradients(plain.bfloat16(), ids))
    got = logits_and_gradients(ours, ids)
    assert {name: g.dtype for name, g in got.items()} == dtypes
    for name, error in errors(oracle, got).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


@methods
def test_float32_outputs_and_gradients(method):
    plain, ours = pair(adapted(method))
    fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


@methods
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_outputs_and_gradients(method, adapter_dtype):
    model = adapted(method, torch.bfloat16, autocast_dtype=adapter_dtype == torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {adapter_dtype}
    assert_bfloat16_parity(model, tokens())


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
def test_float16_stays_close(method):
    """float16 over float32 adapters: 8 times finer than bfloat16, and no overflow on the way."""
    plain, ours = pair(adapted(method, torch.float16))
    fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < 2.0**-7


@pytest.mark.parametrize("method", ["lora", "dora", "miss_bat"])
def test_float64_stays_float64(method):
    plain, ours = pair(adapted(method).double())
    fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < 1e-13


@methods
def test_base_biases(method):
    plain, ours = pair(adapted(method, base_bias=True))
    fused(ours)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


@pytest.mark.parametrize("which", ["lora_only", "all"])
@pytest.mark.parametrize("method", ["lora", "dora", "miss_bat"])
def test_trained_base_biases(method, which):
    which = which.replace("lora", "MiSS") if method == "miss_bat" else which
    plain, ours = pair(adapted(method, base_bias=True, bias=which))
    fused(ours)
    trained = [n for n, p in ours.named_parameters() if n.endswith("base_layer.bias") and p.requires_grad]
    assert len(trained) == 14
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


@pytest.mark.parametrize("base_bias", [False, True])
def test_lora_bias(base_bias):
    plain, ours = pair(adapted("lora", base_bias=base_bias, lora_bias=True))
    fused(ours)
    expected = logits_and_gradients(plain, tokens())
    assert sum(name.endswith("lora_B.default.bias") for name in expected) == 14
    assert worst(expected, logits_and_gradients(ours, tokens())) < EXACT
    assert_bfloat16_parity(adapted("lora", torch.bfloat16, base_bias=base_bias, lora_bias=True), tokens())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_conv1d(dora, dropout):
    """GPT-2's Conv1D keeps its weight transposed."""
    settings = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_dropout": dropout}
    model = perturb(get_peft_model(gpt2(), LoraConfig(r=5, use_dora=dora, bias="lora_only", **settings)))
    plain, ours = pair(model.train(dropout == 0))
    fused(ours, fused=8)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT


def test_conv1d_with_other_data():
    """A weight whose memory is exchanged through .data, which bumps no version: a kept view of it would be stale."""
    plain, ours = pair(perturb(get_peft_model(gpt2(), LoraConfig(r=5, target_modules=["c_attn"], fan_in_fan_out=True))))
    fused(ours, fused=2)
    before = logits_and_gradients(ours, tokens())["logits"]
    for model in (plain, ours):
        for name, p in model.named_parameters():
            if "base_layer.weight" in name:
                p.data = 1.5 * p.data
    got = logits_and_gradients(ours, tokens())
    assert worst(logits_and_gradients(plain, tokens()), got) < EXACT
    assert not torch.allclose(got["logits"], before)


def train(model, steps=20, fused_adamw=False):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=fused_adamw)
    losses = []
    for _ in range(steps):
        for micro in range(2):  # gradients accumulate, so DoRA's norm serves two forwards per step
            loss = loss_of(model, tokens(seed=micro))
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@methods
def test_twenty_steps_of_training(method):
    plain, ours = pair(adapted(method))
    fused(ours)
    expected = train(plain)
    assert expected[-2:].mean() < 0.9 * expected[:2].mean()
    torch.testing.assert_close(train(ours), expected, rtol=2e-5, atol=0)


@pytest.mark.slow
@methods
def test_twenty_steps_of_training_in_bfloat16(method):
    plain, ours = pair(adapted(method, torch.bfloat16))
    exact = train(pair(plain)[1].float())
    fused(ours)
    off = [((train(model) - exact) / exact).abs().max() for model in (ours, plain)]
    assert off[0] <= 2 * off[1] + BFLOAT16, off


def test_fused_adamw_does_not_leave_a_stale_norm():
    """It leaves ``_version`` as it is, so a cache keyed on that would keep the norm of the first step."""
    plain, ours = pair(adapted("dora"))
    fused(ours)
    torch.testing.assert_close(train(ours, fused_adamw=True), train(plain, fused_adamw=True), rtol=2e-5, atol=0)


def test_data_writes_within_a_step_are_seen():
    plain, ours = pair(adapted("dora").eval())
    report = fused(ours)
    for scale in (1.0, 2.0, 0.5):
        for model in (plain, ours):
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data.mul_(scale)
        torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)
    for model in (plain, ours):  # a frozen weight written through .data is announced
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.data.mul_(1.5)
    report.invalidate()
    torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_norm_is_shared_by_micro_batches_and_recomputation(monkeypatch):
    model = adapted("dora")
    fused(model)
    fresh = []
    get = NormCache.get

    def counting(self, *arguments):
        before = self._key, self._step
        result = get(self, *arguments)
        fresh.append((self._key, self._step) != before)
        return result

    monkeypatch.setattr(NormCache, "get", counting)
    train(model, steps=2)
    assert len(fresh) == 2 * 2 * 14 and sum(fresh) == 2 * 14


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "miss"])
def test_gradient_checkpointing_replays_the_dropout(method, reentrant):
    dropout = {"miss_dropout" if method == "miss" else "lora_dropout": 0.4}
    plain, checkpointed = pair(adapted(method, **dropout))
    fused(plain)
    fused(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        results.append(logits_and_gradients(model, tokens()))
    assert worst(*results) < 1e-6
    torch.manual_seed(6)
    assert worst(results[0], logits_and_gradients(plain, tokens())) > 1e-3  # there is dropout


@pytest.mark.parametrize("method", [m for m in METHODS if m != "miss_bat"])  # bat has no dropout, see below
def test_dropout_has_the_right_mean_and_draws_nothing_in_eval(method):
    dropout = {"miss_dropout" if method.startswith("miss") else "lora_dropout": 0.3}
    plain, ours = pair(adapted(method, **dropout))
    fused(ours)
    layers = [next(m for n, m in model.named_modules() if n.endswith("0.mlp.down_proj")) for model in (plain, ours)]
    x = torch.randn(8, 48)
    mean = [torch.stack([layer(x) for _ in range(400)]).mean(0) for layer in layers]
    spread = torch.stack([layers[0](x) for _ in range(100)]).std(0)
    assert ((mean[0] - mean[1]).abs() <= 6 * spread * (2 / 400) ** 0.5 + 1e-6).all()
    before = torch.get_rng_state()
    for model in (plain.eval(), ours.eval()):
        model(tokens())
    torch.testing.assert_close(ours(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_drawn_in_training_without_dropout():
    model = adapted("dora")
    fused(model)
    before = torch.get_rng_state()
    loss_of(model, tokens()).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dora_dropout_is_peft_s_form():
    """With a mask that keeps everything, dropout scales its input: PEFT's formula with that mask, term by term."""
    model = adapted("dora", lora_dropout=0.5)
    fused(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    x = torch.randn(64, 32)
    W, A, B = layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight
    V = W + layer.scaling["default"] * B @ A
    g = layer.lora_magnitude_vector.default.weight / V.norm(dim=1)
    y = layer(x)
    # y - x Wᵀ = x̃ (diag(g) V - W)ᵀ: recover x̃ and see that it is x masked and doubled
    M = g[:, None] * V - W
    dropped = torch.linalg.lstsq(M.double(), (y - x @ W.t()).double().t()).solution.t()
    ratio = dropped / x
    assert torch.isclose(ratio, torch.zeros((), dtype=ratio.dtype), atol=1e-2).logical_or(
        torch.isclose(ratio, torch.full((), 2.0, dtype=ratio.dtype), atol=1e-2)
    ).double().mean() > 0.99  # fmt: skip
    assert 0.4 < (ratio.abs() < 1).double().mean() < 0.6


# --- bat -------------------------------------------------------------------------------------------------------------


def layer_results(layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("shape", [(1, 32), (15, 32), (16, 32), (17, 32), (3, 13, 32)])
def test_bat_of_few_and_many_tokens(shape):
    """Fewer tokens than a block has rows meet the blocks before the weight."""
    plain, ours = pair(adapted("miss_bat", r=16, base_bias=True, bias="all"))
    fused(ours)
    x = torch.randn(*shape)
    plain, ours = (model.base_model.model.model.layers[0].mlp.up_proj for model in (plain, ours))
    expected = layer_results(plain, x)
    assert "base_layer.bias" in expected
    assert worst(expected, layer_results(ours, x)) < EXACT


def test_bat_ignores_its_dropout_as_peft_does():
    plain, ours = pair(adapted("miss_bat", miss_dropout=0.9))
    fused(ours)
    before = torch.get_rng_state()
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_bat_exact_keeps_small_changes(bias):
    """Changes of 1e-4 over a bf16 base, as the outputs for many tokens show them: PEFT has them in float32 outside
    autocast, exact too, and by default the rounding of the transformed weight drowns them."""
    model = adapted("miss_bat", torch.bfloat16, base_bias=bias is not None)
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1e-3)
        elif p.dim() == 1 and bias is not None:
            p.data = p.data.to(bias)
    plain, rounded, exact = (m.base_model.model.model.layers[0].mlp.up_proj for m in (model, *pair(pair(model)[1])))
    rows = [accelerate(rounded).rows[0], accelerate(exact, exact=True, strict=True).rows[0]]
    assert [row.operators for row in rows] == ["bat_linear", "bat_linear, exact"]
    assert "rounded to torch.bfloat16" in rows[0].reason and not rows[1].reason
    x = torch.randn(16000, 32).bfloat16()
    frozen = pair(plain.base_layer)[1].double()(x.double())
    delta = plain.get_delta_weight("default", plain.base_layer.weight).double()

    def off(layer):
        change = torch.linalg.lstsq(x.double(), layer(x).double() - frozen).solution.t()
        return ((change - delta).norm() / delta.norm()).item()

    assert delta.square().mean().sqrt() < 2e-4
    assert off(exact) < 2 * off(plain) < 0.3 and off(rounded) > 0.5
    assert torch.equal(pair(exact)[1](x), exact(x))  # a copy is exact too
    assert errors(layer_results(plain, x), layer_results(exact, x))["miss_block.default"] < BFLOAT16


@pytest.mark.parametrize("reentrant", [False, True])
def test_bat_under_gradient_checkpointing(reentrant):
    plain, checkpointed = pair(adapted("miss_bat"))
    fused(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(checkpointed, tokens())) < EXACT


# --- memory ----------------------------------------------------------------------------------------------------------


def saved(layer, x, **context):
    """(output, [saved tensors that are neither x nor a parameter], one per storage)."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    return y, list(kept.values())


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
def test_saved_for_backward(method):
    """Beyond x and the weights: T r elements, for DoRA also y and vectors of length d, for bat nothing."""
    model = adapted(method)
    fused(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("0.mlp.up_proj"))
    x = torch.randn(64, 32, requires_grad=True)
    y, kept = saved(layer, x)
    sizes = sorted(tuple(t.shape) for t in kept)
    if method == "dora":
        assert sizes == [(64, 5), (64, 48), (2 * 48,)]  # h, y, g and c
        assert any(t.data_ptr() == y.data_ptr() for t in kept)
    else:
        assert sizes == ([] if method == "miss_bat" else [(64, 5)])


def test_recompute_saves_no_output_and_allows_overwriting_it():
    model = adapted("dora")
    layer = next(m for n, m in model.named_modules() if n.endswith("0.mlp.up_proj"))
    x = torch.randn(64, 32, requires_grad=True)
    expected = torch.autograd.grad(layer(x).exp().sum(), list(layer.lora_magnitude_vector.parameters()))[0]
    fused(model)
    with pytest.raises(RuntimeError, match=r"overwritten in place.*accelerate\(model, recompute=True\)"):
        layer(x).exp_().sum().backward()
    accelerate(model, strict=True, recompute=True)
    y, kept = saved(layer, x)
    assert sorted(tuple(t.shape) for t in kept) == [(64, 5), (2 * 48,)]  # h, g and c
    y.exp_().sum().backward()
    torch.testing.assert_close(next(layer.lora_magnitude_vector.parameters()).grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_keeps_no_float32_copy_of_x(method, weights):
    plain, ours = pair(adapted(method, weights))
    fused(ours)
    with torch.autocast("cpu", torch.bfloat16):
        layer = next(m for n, m in ours.named_modules() if n.endswith("0.mlp.up_proj"))
        x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
        y, kept = saved(layer, x)
        assert y.dtype == torch.bfloat16
        assert not [t.shape for t in kept if t.dtype == torch.float32 and t.dim() == 2 and t.shape[0] == 64]
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
        expected, got = logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())
    oracle = logits_and_gradients(pair(plain)[1].double(), tokens())
    theirs = errors(oracle, logits_and_gradients(pair(plain)[1].bfloat16(), tokens()))
    assert all(got[name].dtype == expected[name].dtype for name in got if got[name] is not None)
    for name, error in errors(oracle, got).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


def test_empty_batch():
    for method in ("lora", "dora", "miss", "miss_bat"):
        model = adapted(method)
        fused(model)
        layer = next(m for n, m in model.named_modules() if n.endswith("0.mlp.up_proj"))
        x = torch.empty(0, 3, 32, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (0, 3, 48) and x.grad.shape == x.shape


# --- torch.compile ---------------------------------------------------------------------------------------------------

COMPILE = """
    import sys, torch
    sys.path.insert(0, "{tests}")
    torch.set_num_threads(1)
    from peft_tiny import adapted, pair, worst
    from spectral_ops import accelerate

    def results(call, model, x):
        x = x.clone().requires_grad_()
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        return {{"y": y.detach(), "x": x.grad, **{{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}}}

    x = torch.randn(2, 3, 32)
    cases = [("lora", {{}}), ("dora", {{}}), ("miss", {{}}), ("miss_bat", {{}}), ("miss_bat", {{"r": 4}})]  # 6 tokens
    for method, extra in (*cases, ("dora", {{"lora_dropout": 0.2}})):
        dropout = "lora_dropout" in extra
        plain, ours = pair(adapted(method, base_bias=True, **extra))
        report = accelerate(ours, strict=True)
        plain, ours = (model.base_model.model.model.layers[0].mlp.train(not dropout) for model in (plain, ours))
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert worst(results(plain, plain, x), results(compiled, ours, x)) < {exact}, method
        for n, p in ours.named_parameters():  # a norm that the graph had kept would show now
            if "lora_B" in n:
                p.data.mul_(2)
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-5)
        if dropout:
            compiled = torch.compile(ours.train(), fullgraph=True, backend="aot_eager")
            assert not torch.equal(compiled(x), compiled(x))  # a mask of its own for each call
        assert not report.fallbacks()

    ours = adapted("lora")
    report = accelerate(ours)
    mlp = ours.base_model.model.model.layers[0].mlp
    mlp.up_proj.lora_A["default"].register_forward_hook(lambda *a: None)
    torch._dynamo.reset()
    torch.compile(mlp, backend="aot_eager")(x)
    assert [f.reason for f in report.fallbacks()] == ["lora_A carries hooks of its own"], report.fallbacks()
    print("compiled")
"""


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    script = textwrap.dedent(COMPILE.format(tests=Path(__file__).parents[1] / "support", exact=EXACT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("compiled\n"), done.stdout + done.stderr


GRAPHS = """
    from collections import Counter
    import peft, torch
    from functorch.compile import make_boxed_func
    from torch import nn
    from torch._dynamo.backends.common import aot_autograd
    from spectral_ops import accelerate

    def graphs(model, x):
        found = []

        def keep(graph, inputs):
            calls = [str(n.target).rsplit(".", 1)[0] for n in graph.graph.nodes if n.op == "call_function"]
            found.append(Counter(calls))
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        call = torch.compile(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
        call(x).sum().backward()
        return found

    for dtype in (torch.float32, torch.bfloat16):
        for bias in (False, True):
            model = nn.Sequential(nn.Linear(24, 40, bias=bias, dtype=dtype))
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
            x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
            theirs = graphs(model.base_model.model, x)
            accelerate(model, strict=True)
            ours = graphs(model.base_model.model, x)
            assert len(ours) == len(theirs) == 2
            for direction, a, b in zip(("forward", "backward"), ours, theirs):
                assert a["aten.mm"] + a["aten.addmm"] == (3 if direction == "forward" else 5), a
                assert not a - b, f"{dtype}, {direction}: {a - b} beyond PEFT's graph"
    print("compiled")
"""


@pytest.mark.slow
def test_the_compiler_gets_no_more_of_a_lora_layer_than_of_peft_s():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(GRAPHS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("compiled\n"), done.stdout + done.stderr


def test_config_helper_covers_every_method():
    assert {config(method).peft_type.value for method in METHODS} == {"LORA", "MISS"}
