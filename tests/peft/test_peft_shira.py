"""SHiRA and Super-Tuning under ``accelerate``: the support is built once per index tensor, whatever replaces that, and
what PEFT's layers do with hooks, dtypes, quantised bases and several adapters."""

import copy
import sys
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from instruments import saved_tensors  # noqa: E402
from models import quantised  # noqa: E402
from peft_tiny import perturb, worst  # noqa: E402

from spectral_ops import accelerate, report  # noqa: E402

EXACT = 5e-6
KINDS = {"shira": ("ShiraConfig", {"r": 2}), "supra": ("SupertuningConfig", {"sparsity": 0.9, "r": 3})}
pytestmark = pytest.mark.usefixtures("one_thread")


def config(kind, **fields):
    name, defaults = KINDS[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    return getattr(peft, name)(target_modules=["0"], **{**defaults, **fields})


def adapted(kind, dtype=torch.float32, bias=True, **fields):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).to(dtype)
    return perturb(peft.get_peft_model(base, config(kind, **fields), autocast_adapter_dtype=False)).train()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def layer_of(model):
    return model.base_model.model[0]


def step(model, x):
    """Outputs and gradients, also of x."""
    x = x.clone().requires_grad_()
    for p in model.parameters():
        p.grad = None
    y = model(x)
    y.float().square().sum().backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **trained}


def same(plain, ours, x, limit=EXACT):
    assert worst(step(plain, x), step(ours, x)) < limit


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def supports_built(monkeypatch):
    from spectral_ops.integrations.peft_layers import sparse

    built, build = [], sparse.build
    monkeypatch.setattr(sparse, "build", lambda *args: built.append(1) or build(*args))
    return built


def replace_indices(model, name="default"):
    """Another support in another tensor, as a file brings it."""
    layer = layer_of(model)
    if hasattr(layer, "shira_indices"):
        rows, columns = layer.shira_indices[name]
        layer.shira_indices[name] = torch.stack([(rows + 7) % 40, columns])
    else:
        layer.supertuning_indices[name] = (layer.supertuning_indices[name] + 5) % (24 * 40)


@pytest.mark.parametrize("shape", [(1, 24), (0, 24), (2, 3, 24)])
def test_shapes(kind, shape):
    plain = adapted(kind)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    same(plain, ours, inputs(*shape))
    wide = inputs(3, 48)[:, ::2]
    assert not wide.is_contiguous()
    same(plain, ours, wide)


def test_the_support_is_built_once(kind, monkeypatch):
    """Through training, evaluation, other dtypes of x and a scale; anew where its index tensor is another."""
    built = supports_built(monkeypatch)
    plain = adapted(kind)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    for tokens in (4, 9, 1):
        for model in (plain, ours):
            model.train(tokens != 9)
            if kind == "shira":
                layer_of(model).set_scale("default", float(tokens))
        same(plain, ours, inputs(tokens, 24))
        with torch.autocast("cpu", torch.bfloat16):
            ours(inputs(tokens, 24))
    for count in (1, 2):
        assert len(built) == count
        for model in (plain, ours):
            replace_indices(model)
        same(plain, ours, inputs(4, 24))
    for model in (plain, ours):  # in place, as load_state_dict writes
        indices_of(model).copy_(indices_of(model).flip(-1))
    same(plain, ours, inputs(4, 24))
    assert len(built) == 4
    same(plain.double(), ours.double(), inputs(4, 24, dtype=torch.float64), 1e-12)
    assert len(built) == 5


def indices_of(model):
    layer = layer_of(model)
    return layer.shira_indices["default"] if hasattr(layer, "shira_indices") else layer.supertuning_indices["default"]


def test_a_file_brings_another_support(kind, tmp_path):
    other = adapted(kind)
    replace_indices(other)
    other.save_pretrained(tmp_path)
    plain = adapted(kind)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    same(plain, ours, inputs(4, 24))
    for model in (plain, ours):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    same(plain, ours, inputs(4, 24))
    assert worst({"y": other(inputs(4, 24)).detach()}, {"y": ours(inputs(4, 24)).detach()}) < EXACT


def test_a_graph_is_traced_anew_for_another_support(kind):
    plain = adapted(kind)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer_of(ours), backend="aot_eager", fullgraph=True)
    x = inputs(4, 24)
    for _ in range(2):
        assert worst({"y": plain(x).detach()}, {"y": compiled(x).detach()}) < EXACT
        for model in (plain, ours):
            replace_indices(model)


def test_a_copy_in_a_graph():
    """It has PEFT's forward until a call of its own has built the support."""
    plain, x = adapted("shira"), inputs(4, 24)
    accelerated = copy.deepcopy(plain)
    accelerate(accelerated)
    for called in (False, True):
        ours = copy.deepcopy(accelerated)
        if called:
            ours(x)
        torch._dynamo.reset()
        compiled = torch.compile(layer_of(ours), backend="eager", fullgraph=called)
        assert worst({"y": plain(x).detach()}, {"y": compiled(x).detach()}) < EXACT
        assert [f.reason.startswith("a copy of an accelerated") for f in report(ours).fallbacks()] == [True] * (
            not called
        )


def test_two_adapters_at_once(kind):
    plain = adapted(kind)
    plain.add_adapter("other", config(kind, **({"random_seed": 3} if kind == "shira" else {"select_top": False})))
    plain.base_model.set_adapter(["default", "other"])
    perturb(plain)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    same(plain, ours, inputs(5, 24))
    assert "rosa_linear" in str(report(ours)) and "rosa_update" in str(report(ours))


def test_hooks_of_the_base_layer_are_ignored_with_peft_s_warning(kind):
    plain = adapted(kind)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    for model in (plain, ours):
        layer_of(model).base_layer.register_forward_hook(lambda *args: pytest.fail("the hook ran"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(plain, ours, inputs(4, 24))
    if hasattr(sys.modules[type(layer_of(plain)).__module__], "_warn_once_about_module_hooks"):
        assert sum("hooks set which will be ignored" in str(w.message) for w in caught) == 2
    assert not report(ours).fallbacks()


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_a_base_in_another_dtype_than_the_values(kind, values):
    """The result in the weight's dtype, at most twice as far from float64 as PEFT's."""
    weight = torch.bfloat16 if values == torch.float32 else torch.float32
    plain = adapted(kind, weight)
    for name, p in plain.named_parameters():
        if p.requires_grad and ("shira" in name or "values" in name):
            p.data = p.data.to(values)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    accelerate(ours, strict=True)
    x = inputs(6, 24, dtype=weight)
    oracle = step(exact, x.double())
    theirs, got = step(plain, x), step(ours, x)
    for name, expected in oracle.items():
        assert got[name].dtype == theirs[name].dtype, name
        size = expected.abs().max()
        error, allowed = ((t[name].double() - expected).abs().max() / size for t in (got, theirs))
        assert error <= 2 * allowed + (2.0**-8 if torch.bfloat16 in (weight, values) else 1e-6), (name, error, allowed)


def test_no_gradient_of_what_is_frozen(kind):
    ours = adapted(kind)
    accelerate(ours, strict=True)
    layer = layer_of(ours)
    for p in ours.parameters():
        p.requires_grad_(False)
    x = inputs(4, 24).requires_grad_()
    with saved_tensors() as kept:
        y = ours(x)
    assert not any(t.shape == x.shape for t in kept)  # x is for the gradient of the values
    y.sum().backward()
    assert x.grad is not None and all(p.grad is None for p in layer.parameters())


def test_a_trained_bias_and_a_trained_weight(kind):
    plain = adapted(kind)
    for trained in ("bias", "weight"):
        getattr(layer_of(plain).base_layer, trained).requires_grad_()
        ours = copy.deepcopy(plain)
        accelerate(ours)
        same(plain, ours, inputs(4, 24))
        assert [f.reason for f in report(ours).fallbacks()] == ["the base weight is trained"] * (trained == "weight")


def test_a_place_named_twice_is_left_to_peft(kind):
    plain = adapted(kind)
    indices_of(plain)[..., 1] = indices_of(plain)[..., 0]
    ours = copy.deepcopy(plain)
    accelerate(ours)
    same(plain, ours, inputs(4, 24))
    (fallback,) = report(ours).fallbacks()
    assert fallback.reason.startswith("the indices are no support of a weight [40, 24]")


def test_dropout_acts_on_the_low_rank_part_alone():
    plain = adapted("supra", lora_dropout=0.5)
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    x = inputs(6, 24)
    with torch.no_grad():
        assert not torch.equal(ours(x), ours(x))
        assert worst({"y": plain.eval()(x)}, {"y": ours.eval()(x)}) < EXACT
        for model in (plain.train(), ours.train()):
            layer_of(model).supertuning_lora_B["default"].weight.zero_()
        assert worst({"y": plain(x)}, {"y": ours(x)}) < EXACT


def test_a_mask_of_one_s_own():
    def diagonal(base_layer, r, **kwargs):
        mask = torch.zeros_like(base_layer.weight).flatten()
        mask[: r * (24 + 40)] = 1
        return mask.view_as(base_layer.weight).flip(0)

    torch.manual_seed(0)
    mine = config("shira")
    mine.mask_fn = diagonal
    plain = perturb(peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(24, 40)), mine))
    ours = copy.deepcopy(plain)
    accelerate(ours, strict=True)
    same(plain, ours, inputs(4, 24))


@pytest.mark.parametrize("bits, path", [(4, "fused (base-agnostic)"), (8, "fused")])
def test_shira_over_a_quantised_base(bits, path):
    """PEFT multiplies by the dequantised weight: so does a layer of 4 bits by itself, while one of 8 bits rounds x."""
    from peft.tuners.shira import layer

    if not hasattr(layer, "resolve_quantization_backend"):
        pytest.skip("this PEFT's SHiRA takes no quantised base")
    plain = perturb(peft.get_peft_model(quantised(bits), config("shira"))).train()
    ours = copy.deepcopy(plain)
    assert accelerate(ours, strict=True).rows[0].path == path
    x = inputs(4, 64)
    same(plain, ours, x)
    assert report(ours).rows[0].path == path and not report(ours).fallbacks()
    with saved_tensors() as kept:
        ours(x)
    assert any(t.numel() >= 64 * 64 and t.is_floating_point() for t in kept) == (bits == 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert worst({"y": plain(x).float()}, {"y": ours(x).float()}) < 2.0**-6


def test_shira_over_a_base_that_peft_cannot_dequantise():
    """It adds x Sᵀ to what the layer returns; nothing of the weight is read."""
    plain = adapted("shira")
    utils = pytest.importorskip("peft.utils.quantization_utils")
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        layer_of(model).quantization_backend = utils.ForwardOnlyQuantizationBackend("stand-in")
    accelerate(ours, strict=True)
    same(plain, ours, inputs(4, 24))
    (row,) = report(ours).rows
    assert (row.path, row.operators) == ("fused (base-agnostic)", "rosa_update")
