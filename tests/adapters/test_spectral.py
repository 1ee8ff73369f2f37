"""Spectral Adapters beyond what every method is tested for: exact starts, fusion, training on, quantised bases."""

import copy

import pytest
import torch
from instruments import saved_tensors
from models import perturb, trained
from tensors import storage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_ops as so
from spectral_ops import SpectralConfig, SpectralLinear
from spectral_ops.adapters.quantised import dequantised

MODES = {
    "additive": {"mode": "additive"},
    "residual": {"mode": "additive", "residual": True},
    "rotation": {"mode": "rotation"},
}
modes = pytest.mark.parametrize("mode", MODES)
exact_modes = pytest.mark.parametrize("mode", ["additive", "rotation"])  # which leave the base alone
D, K = 24, 18

pytestmark = pytest.mark.usefixtures("one_thread")


def make(mode, r=4, dtype=torch.float32, linear=None, **fields):
    linear = nn.Linear(K, D).to(dtype) if linear is None else linear
    return SpectralLinear.from_linear(linear, SpectralConfig(r=r, **MODES[mode], **fields))


def model(**fields):
    net = nn.Sequential(nn.Linear(K, D), nn.GELU(), nn.Linear(D, 12))
    return net if not fields else so.attach(net, SpectralConfig(target_modules=["0", "2"], **fields))


# --- the start -------------------------------------------------------------------------------------------------------


@exact_modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_bit_for_bit(mode, dtype):
    linear, x = nn.Linear(K, D).to(dtype), torch.randn(5, K).to(dtype)
    want, weight = linear(x), linear.weight.detach().clone()
    layer = make(mode, linear=linear)
    assert torch.equal(layer(x), want) and torch.equal(layer.weight, weight)
    assert not layer.delta_weight().any()
    if mode == "rotation":
        assert not layer.factors("default")[2].any(), "the core is not exactly zero"
    layer.merge()
    assert torch.equal(layer.weight, weight)
    layer.unmerge()
    perturb(layer)
    assert not torch.equal(layer(x), want)
    net = nn.Sequential(layer)
    with so.disabled(net):
        assert torch.equal(net(x), want)
    so.detach(net)
    assert torch.equal(net(x), want) and torch.equal(net[0].weight, weight)


class RoundedFactors(TorchDispatchMode):
    """Products round their float32 factors to TF32's ten bits, as a GPU does where it is allowed to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in map(torch.Tensor.contiguous, args)]
        return func(*args, **(kwargs or {}))


def test_the_core_keeps_its_digits_where_products_are_rounded_to_tf32():
    layer = make("rotation")
    with RoundedFactors():
        assert not layer.factors("default")[2].any(), "the core of a fresh adapter is not exactly zero"
    perturb(layer, 1e-4)
    exact = copy.deepcopy(layer).double().factors("default")[2]
    with torch.no_grad(), RoundedFactors():
        core = layer.factors("default")[2]
    assert (core - exact).norm() <= 1e-3 * exact.norm()


def test_the_residual_base_lacks_the_triplets_and_gets_them_back():
    linear = nn.Linear(K, D)
    U, S, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    weight = linear.weight.detach().clone()
    layer = make("residual", linear=linear, start=2)
    part = slice(2, 6)
    rest = weight.double() - U[:, part] * S[part] @ Vh[part]
    assert torch.allclose(layer.weight.double(), rest, atol=1e-6)
    assert torch.allclose(layer.original_weight(), weight, atol=1e-6)
    so.detach(net := nn.Sequential(layer))
    assert torch.allclose(net[0].weight, weight, atol=1e-6)


@modes
@pytest.mark.parametrize("start", [0, 5])
def test_the_triplets_are_those_from_start_on(mode, start):
    linear = nn.Linear(K, D).double()
    U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    layer, part = make(mode, linear=linear, start=start), slice(start, start + 4)
    got = layer.spectral_U["default"] * layer.spectral_S["default"] @ layer.spectral_Vh["default"]
    assert torch.allclose(got, U[:, part] * S[part] @ Vh[part], atol=1e-12)
    assert not any(t.requires_grad for t in (layer.spectral_U["default"], layer.spectral_Vh["default"]))


def test_a_randomized_start_takes_niter():
    torch.manual_seed(3)
    first = make("rotation", niter=2, linear=nn.Linear(64, 48))
    torch.manual_seed(3)
    again = make("rotation", niter=2, linear=nn.Linear(64, 48))
    assert torch.equal(first.spectral_U["default"], again.spectral_U["default"])
    every = torch.linalg.svdvals(first.weight)[:4]
    assert torch.allclose(first.spectral_S["default"], every, rtol=0.1)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rotation_gradients_through_cayley_against_dense_autograd(dropout):
    layer, x = perturb(make("rotation", dtype=torch.float64, spectral_dropout=dropout), 0.5), torch.randn(6, K).double()
    X, C = layer.spectral_rotation["default"], layer.spectral_scale["default"]
    torch.manual_seed(1)
    y = layer(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [X, C], dy)
    torch.manual_seed(1)
    mask = x
    if dropout:  # seen through the operator itself: an A of the unit vectors shows drop(x)
        eye = torch.eye(K).double()
        zero = torch.zeros(K, K).double()
        mask = so.lowrank_linear(x, zero, eye, eye, dropout_p=dropout, training=True)
        assert (mask == 0).any() and not torch.equal(mask, x)
    U, S, Vh = (t["default"] for t in (layer.spectral_U, layer.spectral_S, layer.spectral_Vh))
    unit = torch.eye(4).double()
    K_U, K_V = ((m - m.T) / 2 for m in X)
    Q_U, Q_V = ((unit - k) @ torch.linalg.inv(unit + k) for k in (K_U, K_V))
    N = Q_U @ torch.diag(S * C) @ Q_V.T - torch.diag(S)
    want = x @ layer.weight.T + mask @ (U @ N @ Vh).T + layer.bias
    assert torch.allclose(y, want, atol=1e-12)
    for g, w in zip(got, torch.autograd.grad(want, [X, C], dy), strict=True):
        assert torch.allclose(g, w, atol=1e-12)


@modes
def test_gradcheck(mode):
    layer = perturb(make(mode, r=2, linear=nn.Linear(5, 6).double()))
    x, names = torch.randn(3, 5).double().requires_grad_(), [n for n, p in layer.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in trained(layer)]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


def test_small_updates_are_not_lost_in_a_difference():
    """The additive form vanishes term by term: ΔU of 1e-7 beside U of 0.2 still changes W to float32's precision."""
    layer = make("additive")
    perturb(layer, 1e-7)
    dU, dVh = (t["default"].detach().double() for t in (layer.spectral_delta_U, layer.spectral_delta_Vh))
    U, S, Vh = (t["default"].double() for t in (layer.spectral_U, layer.spectral_S, layer.spectral_Vh))
    want = (dU * S) @ (Vh + dVh) + (U * S) @ dVh
    assert (layer.delta_weight() - want).norm() <= 1e-6 * want.norm()


# --- fusion ----------------------------------------------------------------------------------------------------------


@exact_modes
def test_fused_adapters_add_up_and_train_on(mode):
    net, x = model(), torch.randn(4, K)
    base = net(x)
    weights = [net[i].weight.detach().double() for i in (0, 2)]
    for i, name in enumerate("abc"):  # on disjoint triplets
        so.attach(net, SpectralConfig(r=2 + i, start=3 * i, target_modules=["0", "2"], **MODES[mode]), name)
        perturb(net)
    layers = list(so.adapter_layers(net).values())
    deltas = [[layer.delta_weight(name).double() for name in "abc"] for layer in layers]
    for layer in layers:
        Us = torch.cat([layer.spectral_U[name] for name in "abc"], 1)
        assert torch.allclose(Us.T @ Us, torch.eye(Us.shape[1]), atol=1e-5), "not disjoint"
    assert so.fuse_spectral(net, ["a", "b", "c"]) is net
    assert so.adapter_configs(net)["fused"].r == 9 and {layer.active for layer in layers} == {"fused"}
    for layer, parts in zip(layers, deltas, strict=True):
        assert torch.allclose(layer.delta_weight().double(), sum(parts), atol=1e-6)
    W0, W2 = (w + sum(parts) for w, parts in zip(weights, deltas, strict=True))
    hidden = nn.functional.gelu(x.double() @ W0.T + net[0].bias.double())
    want = (hidden @ W2.T + net[2].bias.double()).float()
    assert torch.allclose(net(x), want, atol=1e-5)
    # together: the fused adapter trains, the others stay what they were
    kept = [layer.delta_weight("a") for layer in layers]
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names and all(name.endswith(".fused") for name in names)
    target = want.detach() + 1
    optimizer = torch.optim.Adam(trained(net), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.delta_weight("a"), was) for layer, was in zip(layers, kept, strict=True))
    for name in "abc":
        so.detach(net, name)
    so.merge(net)
    so.unmerge(net)
    so.detach(net)
    assert torch.allclose(net(x), base, atol=1e-5)


@exact_modes
def test_a_fused_adapter_is_saved_as_one(mode, tmp_path):
    pytest.importorskip("safetensors")
    net, x = model(), torch.randn(4, K)
    bare = copy.deepcopy(net)
    for i, name in enumerate("ab"):
        so.attach(net, SpectralConfig(r=3, start=3 * i, target_modules=["0", "2"], **MODES[mode]), name)
        perturb(net)
    so.fuse_spectral(net, ("a", "b"), "both")
    so.save_adapter(net, tmp_path)
    assert torch.equal(so.load_adapter(bare, tmp_path)(x), net(x))


@exact_modes
def test_bfloat16_adapters_fuse_to_bfloat16(mode):
    net = model().bfloat16()
    for i, name in enumerate("ab"):
        config = SpectralConfig(r=2, start=2 * i, target_modules=["0"], **MODES[mode])
        so.attach(net, config, name, autocast_adapter_dtype=False)
    so.fuse_spectral(net, ["a", "b"])
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_what_cannot_be_fused():
    net = model(r=2)
    with pytest.raises(ValueError, match=r"adapter_names: got \['default', 'default'\], wanted a list of different"):
        so.fuse_spectral(net, ["default", "default"])
    for wrong in ([], "default"):
        with pytest.raises(ValueError, match="adapter_names: got .* wanted a list of different names"):
            so.fuse_spectral(net, wrong)
    with pytest.raises(ValueError, match=r"adapter_names: got 'other', wanted names among \['default'\]"):
        so.fuse_spectral(net, ["default", "other"])
    with pytest.raises(ValueError, match="adapter_name: got 'default', wanted a name this model does not have yet"):
        so.fuse_spectral(net, ["default"], "default")
    so.attach(net, SpectralConfig(r=2, mode="rotation", target_modules=["0", "2"]), "turned")
    with pytest.raises(ValueError, match=r"got adapters with mode \['additive', 'rotation'\], wanted one mode"):
        so.fuse_spectral(net, ["default", "turned"])
    so.attach(net, SpectralConfig(r=2, start=2, target_modules=["0"]), "first")
    with pytest.raises(ValueError, match="got 'first', which '2' lacks"):
        so.fuse_spectral(net, ["default", "first"])
    so.attach(net, SpectralConfig(r=9, start=3, target_modules=["0", "2"]), "many")
    so.attach(net, SpectralConfig(r=4, target_modules=["0", "2"]), "more")
    with pytest.raises(ValueError, match=r"SpectralConfig.r: got 13, wanted at most 12 - start \(0\)"):
        so.fuse_spectral(net, ["many", "more"])
    so.set_adapter(net, "default")
    so.merge(net)
    with pytest.raises(ValueError, match="got 'default', merged in '0', wanted unmerged adapters"):
        so.fuse_spectral(net, ["default", "more"])
    with pytest.raises(ValueError, match="adapter_names: got residual=True or modules_to_save"):
        so.fuse_spectral(model(r=2, residual=True), ["default"])
    with pytest.raises(TypeError, match="got 'default', a LoRAConfig, wanted Spectral Adapters"):
        so.fuse_spectral(so.attach(model(), so.LoRAConfig(r=2, target_modules=["0"])), ["default"])
    assert "fused" not in so.adapter_configs(net)


# --- training on -----------------------------------------------------------------------------------------------------


@modes
def test_training_resumes_bit_for_bit(mode, tmp_path):
    x, target = torch.randn(16, K), torch.randn(16, 12)

    def steps(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), target).backward()
            optimizer.step()

    net = model(r=3, **MODES[mode])
    optimizer = torch.optim.AdamW(trained(net), lr=1e-2)
    steps(net, optimizer, 3)
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    steps(net, optimizer, 3)
    again = model(r=3, **MODES[mode])
    state, moments = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(state)
    other = torch.optim.AdamW(trained(again), lr=1e-2)
    other.load_state_dict(moments)
    steps(again, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


def test_rotations_stay_orthogonal_in_training():
    net, x, target = model(r=8, mode="rotation"), torch.randn(16, K), torch.randn(16, 12)
    optimizer = torch.optim.AdamW(trained(net), lr=3e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
    for layer in so.adapter_layers(net).values():
        Q = so.cayley(layer.spectral_rotation["default"]).detach()
        assert (Q.mT @ Q - torch.eye(8)).abs().max() < 1e-5
        assert (Q - torch.eye(8)).abs().max() > 0.3, "nothing was rotated"


def test_one_residual_adapter_per_layer():
    net = model(r=2, residual=True)
    with pytest.raises(ValueError, match="0: adapter_name: got a second adapter on a layer with"):
        so.attach(net, SpectralConfig(r=2, start=4, target_modules=["0"]), "other")
    net = model(r=2)
    with pytest.raises(ValueError, match="wanted a layer of its own for residual=True"):
        so.attach(net, SpectralConfig(r=2, residual=True, target_modules=["0"]), "other")


def test_what_is_saved_for_backward():
    """h of rank r (2r where the base is untouched) besides x and [r, r] matrices: nothing of T d."""
    T = 256
    for mode, rank in (("additive", 8), ("residual", 4), ("rotation", 4)):
        layer, x = make(mode), torch.randn(T, K, requires_grad=True)
        with saved_tensors() as kept:
            layer(x)
        known = {storage(t) for t in (x, *layer.parameters())}
        tall = {storage(t): t for t in kept if storage(t) not in known and t.shape[0] == T}
        assert [t.shape for t in tall.values()] == ([(T, rank)] if mode != "rotation" else [(T, rank)])


# --- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@modes
def test_over_a_quantised_base(mode, kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        linear = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
    else:
        linear = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    linear.load_state_dict(nn.Linear(64, 48).state_dict())
    net, x = nn.Sequential(linear.to("cpu")), torch.randn(5, 64, requires_grad=True)
    base = net(x)
    config = SpectralConfig(r=4, target_modules=["0"], **MODES[mode])
    S = torch.linalg.svdvals(dequantised(linear).double())
    so.attach(net, config)
    layer = net[0]
    if mode == "residual":  # what is left of the weight is rounded to its format again
        assert 0 < (net(x) - base).norm() <= 0.2 * base.norm()
        base = layer.base_layer(x)
    else:
        assert torch.equal(net(x), base)
    assert torch.allclose(layer.spectral_S["default"].double(), S[:4], rtol=1e-5)
    perturb(layer)
    want = base.double() + x.double() @ layer.delta_weight().double().T
    assert torch.allclose(net(x).double(), want, atol=1e-4)
    gradients = torch.autograd.grad(net(x).square().sum(), [x, *trained(layer)])
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "both"}, r"SpectralConfig\.mode: got 'both', wanted \"additive\" or \"rotation\""),
        ({"start": -1}, r"SpectralConfig\.start: got -1, wanted at least 0"),
        ({"start": 1.5}, r"SpectralConfig\.start: got 1\.5 \(float\), wanted an integer"),
        ({"niter": -1}, r"SpectralConfig\.niter: got -1"),
        ({"residual": 1}, r"SpectralConfig\.residual: got 1, wanted False, or True in mode"),
        ({"residual": True, "mode": "rotation"}, r"residual: got True, wanted False, or True in mode \"additive\""),
        ({"spectral_dropout": 1.0}, r"spectral_dropout: got 1\.0"),
        ({"r": 0}, r"SpectralConfig\.r: got 0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SpectralConfig(**fields)


@pytest.mark.parametrize(("r", "start"), [(19, 0), (4, 15)])
def test_more_triplets_than_there_are(r, start):
    with pytest.raises(ValueError, match=rf"SpectralConfig.r: got {r}, wanted at most 18 - start \({start}\)"):
        make("rotation", r=r, start=start)
