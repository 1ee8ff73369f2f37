"""Where the fast path does not fit, PEFT's own forward runs and the report names the layer and the reason."""

import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, MissConfig, __version__, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners.lora import variants  # noqa: E402
from peft.tuners.miss import MissLinear  # noqa: E402
from peft_tiny import (  # noqa: E402
    ATTENTION,
    adapted,
    config,
    llama,
    logits_and_gradients,
    pair,
    perturb,
    tokens,
    worst,
)
from transformers.pytorch_utils import Conv1D  # noqa: E402

from spectral_ops import accelerate, restore  # noqa: E402

PEFT = f"PEFT {__version__}"
EXACT = 5e-6
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two linear layers, a convolution and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 12)

    def forward(self, ids, **kwargs):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).contiguous()
        return self.second(torch.tanh(self.first(x)))


def net(targets=("first", "second"), kind=LoraConfig, **settings):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": list(targets), **settings}
    return perturb(get_peft_model(Net(), kind(**settings)))


def layer(model, name="first"):
    return getattr(model.base_model.model, name)


IDS = torch.arange(10).reshape(2, 5)


def check(model, reason, *, break_it=lambda model: None, during=contextlib.nullcontext, call=lambda m: m(IDS)):
    """PEFT's numbers, and ``reason`` reported for the first layer."""
    plain, ours = pair(model)
    strict = pair(model)[1]
    report = accelerate(ours)
    for m in (plain, ours):
        break_it(m)
    with during(plain):
        expected = call(plain)
    with during(ours):
        got = call(ours)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert reason in {f.reason for f in report.fallbacks() if f.name.endswith("first")}, report.fallbacks()
    assert reason in str(report)
    with pytest.raises(RuntimeError, match="strict=True"):
        accelerate(strict, strict=True)  # at once where it can be known, else at the call
        break_it(strict)
        with during(strict):
            call(strict)


def with_bias(model):
    """A bias on every lora_B, which PEFT's configuration refuses for DoRA and its layers would take."""
    for name in ("first", "second"):
        b = layer(model, name).lora_B["default"]
        b.bias = nn.Parameter(torch.ones(b.out_features))
    return model


# --- known when accelerate is called ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: with_bias(net(use_dora=True)), "DoRA with lora_bias"),
        (lambda: net(alora_invocation_tokens=[1]), "the LoRA variant ALora is left to PEFT"),
        pytest.param(
            lambda: net(init_lora_weights="mica"),
            "the LoRA variant MiCA is left to PEFT",
            marks=pytest.mark.skipif(not hasattr(variants, "MiCALinearVariant"), reason=f"{PEFT} has no MiCA"),
        ),
    ],
)
def test_layers_left_to_peft_from_the_start(model, reason):
    plain, ours = pair(model())
    report = accelerate(ours)
    assert [row.path for row in report.rows] == ["PEFT", "PEFT"]
    assert all(row.reason.startswith(reason) for row in report.rows)
    assert torch.equal(plain(IDS), ours(IDS))
    with pytest.raises(RuntimeError, match="2 layers would be left to PEFT") as error:
        accelerate(restore(ours), strict=True)
    assert "base_model.model.second" in str(error.value)
    assert not hasattr(layer(ours), "_spectral_ops")  # nothing was changed


def test_convolutions_and_embeddings_are_reported():
    plain, ours = pair(net(("first", "second", "conv", "embed")))
    report = accelerate(ours, strict=True)
    rows = {row.name.rpartition(".")[2]: row for row in report.rows}
    assert {name: row.path for name, row in rows.items()} == {
        "first": "fused",
        "second": "fused",
        "conv": "fused",
        "embed": "fused (base-agnostic)",
    }
    assert rows["conv"].peft_class == "lora.Conv1d" and rows["conv"].operators == "conv_update"
    assert rows["embed"].peft_class == "lora.Embedding" and rows["embed"].operators == "embedding_update"
    torch.testing.assert_close(ours(IDS), plain(IDS))


def test_other_tuners_are_left_to_peft():
    config = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
    torch.manual_seed(1)
    plain, ours = pair(perturb(get_peft_model(Net(), config)))
    report = accelerate(ours)
    assert [row.path for row in report.rows] == ["PEFT", "PEFT"]
    assert report.rows[0].method == "ia3" and "left to PEFT" in report.rows[0].reason
    assert torch.equal(plain(IDS), ours(IDS))


def test_multihead_attention_is_left_to_peft():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.attn(x, x, x)[0])

    model = perturb(get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attn", "head"])))
    plain, ours = pair(model)
    report = accelerate(ours)
    assert {row.name.rpartition("model.")[2]: row.path for row in report.rows} == {
        "attn": "PEFT",
        "attn.base_layer.out_proj": "PEFT",
        "head": "fused",
    }
    x = torch.randn(3, 2, 16)
    torch.testing.assert_close(ours(x), plain(x))


def test_a_parametrized_base_layer():
    def parametrize(model):
        nn.utils.parametrizations.spectral_norm(layer(model).base_layer)

    model = net().eval()
    parametrize(model)
    check(model, "the base layer is parametrized")


def test_no_peft_layer_at_all():
    with pytest.raises(ValueError, match="got a Net without any PEFT adapter layer"):
        accelerate(Net())
    with pytest.raises(TypeError, match="model: got 'llama'"):
        accelerate("llama")
    with pytest.raises(TypeError, match="model: got 3"):
        restore(3)


# --- seen at the call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "hook",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_an_adapter_submodule(leaf, hook):
    calls = []

    def break_it(model):
        getattr(getattr(layer(model), leaf)["default"], hook)(lambda *a: calls.append(1))

    check(net(), f"{leaf} carries hooks of its own", break_it=break_it)
    assert "backward" in hook or len(calls) == 2


def test_a_replaced_forward_counts_as_a_hook():
    def break_it(model):
        a = layer(model).lora_A["default"]
        a.forward = functools.partial(type(a).forward, a)

    check(net(), "lora_A carries hooks of its own", break_it=break_it)


def test_device_map_offload():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    def offload(model):
        weights = dict(layer(model).base_layer.state_dict())
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=False)
        add_hook_to_module(layer(model).base_layer, hook)
        assert layer(model).base_layer.weight.is_meta

    plain, ours = pair(net())
    report = accelerate(ours)
    offload(ours)
    assert torch.equal(plain(IDS), ours(IDS))
    assert {f.reason for f in report.fallbacks()} == {"the base weight is on the meta device (offloaded)"}


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("kind", [LoraConfig, MissConfig])
def test_a_hooked_base_layer_is_called_as_a_module(kind, hook):
    """Its hooks see the frozen layer's own result, before and after the adapter is added to it."""
    plain, ours = pair(net(kind=kind))
    report = accelerate(ours)
    seen = []
    for model in (plain, ours):
        getattr(layer(model, "second").base_layer, hook)(lambda *a: seen.append(a[-1]))
        model(IDS).square().sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0])
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert not report.fallbacks()
    assert [row.path for row in accelerate(ours).rows] == ["fused", "fused (base-agnostic)"]


def test_a_subclass_of_linear_is_called_as_a_module():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, ours = pair(net())
    report = accelerate(ours)
    for model in (plain, ours):
        layer(model).base_layer.__class__ = Doubled
    torch.testing.assert_close(ours(IDS), plain(IDS))
    assert not report.fallbacks()


def test_global_hooks():
    calls = []

    @contextlib.contextmanager
    def hook(model):
        handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(1))
        try:
            yield
        finally:
            handle.remove()

    check(net(), "a global module hook is registered, which must see every submodule called", during=hook)


def test_zero3_parameters():
    """One that is not whole and that nobody makes whole; the engine itself is in tests/trainers/test_deepspeed.py."""

    def partition(p):
        p.ds_id, p.ds_status = 4, SimpleNamespace(name="NOT_AVAILABLE")

    reason = "the weight of Linear is partitioned by ZeRO-3"
    check(net(), reason, break_it=lambda model: partition(layer(model).lora_B["default"].weight))
    check(net(), reason, break_it=lambda model: partition(layer(model).base_layer.weight))
    check(net(kind=MissConfig), reason, break_it=lambda model: partition(layer(model).base_layer.weight))


def test_a_tensor_subclass():
    class Wrapped(torch.Tensor):
        pass

    def wrap(model):
        base = layer(model).base_layer
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Wrapped), requires_grad=False)

    check(net(), "the base weight is a Wrapped, not a plain tensor", break_it=wrap)
    x = torch.randn(3, 12).as_subclass(Wrapped)
    check(net(), "x is a Wrapped, not a plain tensor", call=lambda m: layer(m)(x))


def test_a_trained_base_weight():
    def thaw(model):
        layer(model).base_layer.weight.requires_grad_()

    model = net()
    check(model, "the base weight is trained", break_it=thaw)
    plain, ours = pair(model)
    report = accelerate(ours)
    thaw(ours)
    with torch.no_grad():  # nothing trains here: the fast path fits
        torch.testing.assert_close(ours(IDS), plain(IDS))
    assert not report.fallbacks()


def test_mixed_batch():
    model = net()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first", "second"]))
    names = ["default", "__base__"]
    check(model.eval(), "a mixed batch (adapter_names)", call=lambda m: m(IDS, adapter_names=names))


def test_alora_offsets():
    check(net(), "alora_offsets", call=lambda m: layer(m)(torch.ones(2, 12), alora_offsets=[1, None]))


def test_dropout_of_everything():
    def drop(model):
        layer(model).lora_dropout["default"].p = 1.0

    check(net(("first",), lora_dropout=0.1).train(), "lora_dropout drops everything (p = 1.0)", break_it=drop)


def bat(**settings):
    return net(kind=MissConfig, init_weights="bat", **settings)


def test_several_active_bat_adapters():
    """Each transforms the weight that the one before it made."""
    model = bat()
    model.add_adapter("other", MissConfig(r=2, target_modules=["first"], init_weights="bat"))
    model.base_model.set_adapter(["default", "other"])
    check(perturb(model), "several active bat adapters: each transforms the weight that the one before it made")
    plain, ours = pair(model)
    report = accelerate(ours)
    for name in ("other", "default"):
        for m in (plain, ours):
            m.set_adapter(name)
        torch.testing.assert_close(ours(IDS), plain(IDS))
    assert not report.fallbacks()


def test_bat_over_conv1d():
    """PEFT refuses to make one; a layer built by hand takes the stored weight for [d, k], whatever that means."""
    base = Conv1D(8, 8).requires_grad_(False)
    if "config" not in inspect.signature(MissLinear).parameters:
        pytest.skip(f"{PEFT} makes MiSS layers over nn.Linear alone")
    model = nn.Sequential(MissLinear(base, "default", MissConfig(r=4, init_weights="bat"), r=4))
    plain, ours = pair(perturb(model))
    report = accelerate(ours)
    assert report.rows[0].reason == "PEFT's bat takes the weight of a Conv1D as it is stored, transposed"
    x = torch.randn(5, 8)
    assert torch.equal(plain(x), ours(x))


@pytest.mark.parametrize("shape", [(4, 20), (5, 4, 5), (3, 4, 4)])
def test_bat_blocks_of_a_wrong_shape(shape):
    model = bat()
    layer(model).miss_block["default"] = nn.Parameter(torch.zeros(shape))
    report = accelerate(model)
    assert report.rows[0].reason == f"miss_block {list(shape)} does not fit the layer's kind (bat)"


def test_bat_over_a_trained_base_weight():
    """PEFT's bat gives the weight no gradient; that stays PEFT's doing."""
    model = bat()
    check(model, "the base weight is trained", break_it=lambda m: layer(m).base_layer.weight.requires_grad_())


def test_adapters_in_another_dtype_with_input_casting_disabled():
    casting = get_peft_model(Net().bfloat16(), LoraConfig(r=4, target_modules=["first"]))

    @contextlib.contextmanager
    def disabled(model):
        with disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16, enabled=False):
            yield

    ours = pair(casting)[1]
    report = accelerate(ours)
    for m in (casting, ours):  # PEFT cannot multiply them either; its error is the one that shows
        with disabled(m), pytest.raises(RuntimeError, match="same dtype"):
            m(IDS)
    assert report.fallbacks()[0].reason.endswith("with input casting disabled")


def test_x_in_another_dtype_than_the_weight():
    model = net()
    report = accelerate(model)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(model)(torch.ones(2, 12, dtype=torch.bfloat16))
    assert report.fallbacks()[0].reason == "x is torch.bfloat16 over a base weight in torch.float32"


def test_an_adapter_over_an_adapter():
    inner = net()
    layer(inner).base_layer = layer(net(r=2))
    check(inner, "the base layer is itself an adapter layer")


def test_miss_adapters_of_different_kinds():
    """PEFT keeps one kind per layer, that of its first adapter; a second of another kind is PEFT's own error."""
    model = net(kind=MissConfig)
    model.add_adapter("small", MissConfig(r=4, target_modules=["first", "second"], init_weights="mini", mini_r=4))
    model.set_adapter("small")
    report = accelerate(model)
    assert "does not fit the layer's kind" in report.rows[0].reason
    with pytest.raises(RuntimeError):
        model(IDS)


# --- still fast ------------------------------------------------------------------------------------------------------


def test_disabled_and_merged_adapters_run_the_base_layer_alone():
    for model in (net(), net(kind=MissConfig), bat()):
        plain, ours = pair(model)
        report = accelerate(ours, strict=True)
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(plain(IDS), ours(IDS))
        for model in (plain, ours):
            model.merge_adapter()
        assert torch.equal(plain(IDS), ours(IDS))
        for model in (plain, ours):
            model.unmerge_adapter()
        torch.testing.assert_close(ours(IDS), plain(IDS))
        assert not report.fallbacks()


@pytest.mark.parametrize("dora", [False, True])
def test_switching_adapters(dora):
    model = net(use_dora=dora)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"], use_rslora=True))
    plain, ours = pair(perturb(model, 0.0))
    report = accelerate(ours, strict=True)
    outputs = []
    for name in ("other", "default", "other"):
        for m in (plain, ours):
            m.set_adapter(name)
        outputs.append(ours(IDS))
        torch.testing.assert_close(outputs[-1], plain(IDS))
        ours(IDS).sum().backward()  # the adapter that was switched to is the one that gets gradients
        assert layer(ours).lora_A[name].weight.grad is not None
    torch.testing.assert_close(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    assert not report.fallbacks()


def test_several_active_adapters():
    for first, second, third in (
        (LoraConfig, {"lora_bias": True}, {"use_rslora": True}),
        (MissConfig, {}, {}),
    ):
        model = net(kind=first, r=5)
        model.add_adapter("second", first(r=3, target_modules=["first", "second"], **second))
        model.add_adapter("third", first(r=2, target_modules=["second"], **third))
        model.base_model.set_adapter(["default", "second", "third"])
        plain, ours = pair(perturb(model))
        report = accelerate(ours, strict=True)
        results = []
        for m in (plain, ours):
            y = m(IDS)
            y.square().sum().backward()
            results.append({"y": y.detach(), **{n: p.grad for n, p in m.named_parameters() if p.requires_grad}})
        assert worst(*results) < EXACT
        assert not report.fallbacks() and ", " in report.rows[0].operators


def test_an_adapter_that_skips_a_layer():
    model = net(("first",))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["second"]))
    model.set_adapter("other")
    report = accelerate(model, strict=True)
    assert report.rows[0].reason == "no active adapter here: the base layer alone"
    x = torch.randn(3, 12)
    assert torch.equal(layer(model)(x), layer(model).base_layer(x))


@pytest.mark.parametrize("settings", [{}, {"kind": MissConfig}, {"kind": MissConfig, "init_weights": "bat"}])
def test_plain_tensors_in_the_place_of_parameters(settings):
    """What FSDP1 and DataParallel leave on a module during forward."""
    plain, ours = pair(net(**settings))
    report = accelerate(ours, strict=True)
    for module in layer(ours).modules():
        for name, p in [item for item in module._parameters.items() if item[1] is not None]:
            del module._parameters[name]
            module.__dict__[name] = p.detach()
    torch.testing.assert_close(ours(IDS), plain(IDS))
    assert not report.fallbacks()


def test_scaling_changes_are_seen():
    plain, ours = pair(net(use_dora=True))
    accelerate(ours)
    for factor in (0.5, 2.0):
        for model in (plain, ours):
            layer(model).scale_layer(factor)
        torch.testing.assert_close(ours(IDS), plain(IDS))


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "miss_bat"])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude", "everything"])
def test_frozen_parameters_get_no_gradient(method, frozen):
    plain, ours = pair(adapted(method))
    report = accelerate(ours, strict=True)
    for model in (plain, ours):
        for name, p in model.named_parameters():
            if frozen in name or frozen == "everything":
                p.requires_grad_(False)
    assert worst(logits_and_gradients(plain, tokens()), logits_and_gradients(ours, tokens())) < EXACT
    assert not report.fallbacks()


def test_a_report_reads_well():
    model = get_peft_model(llama(), config("dora", target_modules=[*ATTENTION, "embed_tokens"]))
    report = accelerate(model)
    assert report.counts == {"fused": 9, "fused (base-agnostic)": 0, "PEFT": 0}
    lines = str(report).splitlines()
    planned = "9 layers fused, 0 fused over their own base layer, 0 left to PEFT"
    assert lines[0] == f"{planned} (planned: no call was seen yet)"
    dora = next(line for line in lines if "lora.Linear" in line)
    assert "column_norm, dora_linear" in dora and "q_proj, k_proj, v_proj, o_proj" in dora and dora.split()[0] == "8"
    assert len(lines) == 4  # a count, a heading, and one line for all layers of a kind
