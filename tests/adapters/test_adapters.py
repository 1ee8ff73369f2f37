"""Adapter modules: each method against a dense formula, training, merging, switching, disabling, and whole models."""

import copy
import pickle

import pytest
import torch
from instruments import fresh_python
from models import Conv1D, adamw, perturb, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ops as so
from spectral_ops import (
    AdaLoRAConfig,
    AdaLoRADashConfig,
    AdaLoRADashLinear,
    AdaLoRALinear,
    BatConfig,
    BatLinear,
    BoneConfig,
    BoneLinear,
    DoRAConfig,
    DoRALinear,
    DVoRAConfig,
    DVoRALinear,
    LoRAConfig,
    LoRADashConfig,
    LoRADashLinear,
    LoRALinear,
    PiCaConfig,
    PiCaLinear,
    RoSAConfig,
    RoSALinear,
    SpectralConfig,
    SpectralLinear,
    SVFTConfig,
    SVFTLinear,
    VeRAConfig,
    VeRALinear,
)
from spectral_ops.adapters.dash import DashLinear
from spectral_ops.init import topk_pattern

CONFIGS = {
    "lora": LoRAConfig(r=4, lora_alpha=6),
    "rslora": LoRAConfig(r=4, lora_alpha=6, use_rslora=True),
    "pissa": LoRAConfig(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "milora": LoRAConfig(r=4, lora_alpha=6, init_lora_weights="milora"),
    "dora": DoRAConfig(r=4, lora_alpha=6),
    "dora_pissa": DoRAConfig(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "bone": BoneConfig(r=5),
    "mini": BoneConfig(r=5, init_weights="mini", mini_r=6),
    "bat": BatConfig(r=2),
    "bat_exact": BatConfig(r=2, exact=True),
    "bat_row": BatConfig(r=2, mode="row"),
    "rosa": RoSAConfig(r=4, lora_alpha=6, d=0.1),
    "rosa_resident": RoSAConfig(r=4, lora_alpha=6, d=0.1, route="resident"),
    "rosa_spa": RoSAConfig(d=0.1, schedule="spa_only", route="scatter"),
    "rosa_lora": RoSAConfig(r=4, lora_alpha=6, schedule="lora_only"),
    "pica": PiCaConfig(r=4),
    "pica_output": PiCaConfig(r=4, side="output"),
    "spectral": SpectralConfig(r=4, start=1),
    "spectral_residual": SpectralConfig(r=4, residual=True),
    "spectral_rotation": SpectralConfig(r=4, mode="rotation"),
    "svft": SVFTConfig(off_diag=1),
    "dash": LoRADashConfig(r=4, lora_alpha=6, directions=3),
    "vera": VeRAConfig(r=30),
    "dvora": DVoRAConfig(r=30),
    "adalora": AdaLoRAConfig(init_r=4, target_r=2, lora_alpha=6, total_step=20),
    "adalora_dash": AdaLoRADashConfig(init_r=4, target_r=2, lora_alpha=6, total_step=20, directions=3),
}
CLASSES = {
    LoRAConfig: LoRALinear,
    DoRAConfig: DoRALinear,
    BoneConfig: BoneLinear,
    BatConfig: BatLinear,
    RoSAConfig: RoSALinear,
    PiCaConfig: PiCaLinear,
    SpectralConfig: SpectralLinear,
    SVFTConfig: SVFTLinear,
    LoRADashConfig: LoRADashLinear,
    VeRAConfig: VeRALinear,
    DVoRAConfig: DVoRALinear,
    AdaLoRAConfig: AdaLoRALinear,
    AdaLoRADashConfig: AdaLoRADashLinear,
}
methods = pytest.mark.parametrize("method", CONFIGS)
D, K = 24, 18

pytestmark = pytest.mark.usefixtures("one_thread")


def make(method, *, dtype=torch.float32, transposed=False, bias=True, trained=True, **options):
    """An adapted layer whose adapter is past its initialisation, and the original weight [d, k] in float64."""
    base = Conv1D(D, K) if transposed else nn.Linear(K, D, bias=bias)
    base = base.to(dtype)
    original = (base.weight.T if transposed else base.weight).detach().double().clone()
    layer = masked(CLASSES[type(CONFIGS[method])].from_linear(base, CONFIGS[method], **options))
    return perturb(layer) if trained else layer, original


def masked(module):
    """The module; its RoSA layers have a random mask, its LoRA-Dash layers their directions."""
    for layer in module.modules():
        if isinstance(layer, DashLinear) and layer.active in layer.settings:
            layer.launch()
        if isinstance(layer, RoSALinear) and "rosa_values" in layer.held(layer.active):
            places = torch.rand(layer.out_features, layer.in_features)
            layer.set_mask(topk_pattern(places, layer.rosa_values[layer.active].numel()))
    return module


def attach(model, *args, **options):
    return masked(so.attach(model, *args, **options))


def trained_names(layer, path, name="default"):
    """The parameters that an adapter trains, as the model at whose ``path`` the layer is names them."""
    keys = [key for key in layer.trainable(name) if key in layer.held(name)]
    return {f"{path}.{key}.{name}{'.weight' if key in layer.tied_keys else ''}" for key in keys}


def dense_weight(layer, name="default"):
    """The adapted weight in float64, from METHODS alone."""
    W = (layer.weight.T if layer.transposed else layer.weight).detach().double()
    if isinstance(layer, BoneLinear):
        block = layer.miss_block[name].double()
        r, q = block.shape
        delta = torch.stack([torch.stack([block[i % r, o % q] for i in range(K)]) for o in range(D)])
        return W + delta
    config = layer.settings[name]
    if isinstance(layer, PiCaLinear):
        P, M = layer.pica_P[name].double(), layer.pica_M[name].double()
        return W + (M @ P if config.side == "input" else P @ M)
    if isinstance(layer, VeRALinear):
        A, B = layer.vera_A[name].double()[:, : W.shape[1]], layer.vera_B[name].double()[: W.shape[0]]
        V = W + layer.vera_lambda_b[name].double().diag() @ B @ layer.vera_lambda_d[name].double().diag() @ A
        return V if type(layer) is VeRALinear else with_magnitude(V, layer.vera_magnitude_vector[name])
    if isinstance(layer, BatLinear):
        block, rows = layer.miss_block[name].double(), []
        r = block.shape[-1]
        for o in range(D // r):
            B = [block[j if config.mode == "row" else o] for j in range(K // r)]
            W_o = W[o * r : (o + 1) * r].split(r, 1)
            rows.append(torch.cat([w + w @ b + b for w, b in zip(W_o, B, strict=True)], 1))
        return torch.cat(rows)
    if isinstance(layer, SpectralLinear):
        U, S, V = layer.spectral_U[name].double(), layer.spectral_S[name].double(), layer.spectral_Vh[name].double().T
        if config.mode == "rotation":
            eye = torch.eye(len(S), dtype=torch.float64)
            skew = [(X - X.T) / 2 for X in layer.spectral_rotation[name].double()]
            Q_U, Q_V = ((eye - skew_part) @ torch.linalg.inv(eye + skew_part) for skew_part in skew)
            return W + U @ (Q_U @ torch.diag(S * layer.spectral_scale[name].double()) @ Q_V.T - torch.diag(S)) @ V.T
        turned_U, turned_V = U + layer.spectral_delta_U[name].double(), V + layer.spectral_delta_Vh[name].double().T
        adapted = W + turned_U @ torch.diag(S) @ turned_V.T
        return adapted if config.residual else adapted - U @ torch.diag(S) @ V.T
    if isinstance(layer, SVFTLinear):
        return W + layer.svft_U[name].double() @ layer.csr(name).to_dense().double() @ layer.svft_Vh[name].double()
    if isinstance(layer, RoSALinear) and config.sparse:
        W = W + layer.csr(name).to_dense().double()
        if not config.low_rank:
            return W
    if isinstance(layer, DashLinear):
        W = W + layer.dash_U[name].double() * layer.dash_delta[name].double() @ layer.dash_V[name].double()
    if isinstance(layer, AdaLoRALinear):
        A, B, E = (getattr(layer, key)[name].double() for key in ("lora_A", "lora_B", "lora_E"))
        return W + config.lora_alpha / (config.init_r + 1e-5) * B @ torch.diag(E[:, 0]) @ A
    gamma = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    V = W + gamma * layer.lora_B[name].double() @ layer.lora_A[name].double()
    if isinstance(layer, DoRALinear):
        V = with_magnitude(V, layer.lora_magnitude_vector[name])
    return V


def with_magnitude(V, magnitude):
    """DoRA: the rows of V scaled to ``magnitude``, no gradient through their norms."""
    return (magnitude.double() / V.square().sum(1).sqrt().detach())[:, None] * V


def bias_of(layer):
    return 0 if layer.bias is None else layer.bias.double()


# --- one layer -------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
def test_output_and_gradients_are_those_of_the_dense_formula(method, transposed, dtype):
    layer, _ = make(method, dtype=dtype, transposed=transposed)
    x = torch.randn(3, 5, K).to(dtype).requires_grad_()
    dy = torch.randn(3, 5, D).to(dtype)
    parameters = trained(layer)
    want = x.double() @ dense_weight(layer).T + bias_of(layer)
    wanted = torch.autograd.grad(want, [x, *parameters], dy.double())
    got = layer(x)
    gradients = torch.autograd.grad(got, [x, *parameters], dy)
    assert got.dtype == dtype and len(parameters) == len(trained_names(layer, ""))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for g, w, like in zip([got, *gradients], [want, *wanted], [got, x, *parameters], strict=True):
        assert g.dtype == like.dtype
        assert (g.double() - w.double()).norm() <= tolerance * w.double().norm()


@methods
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_a_fresh_adapter_changes_nothing(method, transposed):
    layer, original = make(method, transposed=transposed, trained=False)
    x = torch.randn(5, K)
    want = (x.double() @ original.T + bias_of(layer)).float()
    assert torch.allclose(layer(x), want, atol=1e-5)
    assert torch.allclose(layer.original_weight().double(), original, atol=1e-6)


@methods
def test_delta_weight_is_what_a_merge_adds(method):
    layer, _ = make(method)
    before = layer.matrix.detach().clone()
    delta = layer.delta_weight()
    assert delta.dtype == torch.float32
    assert torch.allclose(before + delta, dense_weight(layer).float(), atol=1e-5)
    layer.merge()
    assert torch.allclose(layer.matrix - before, delta, atol=1e-5)
    assert torch.allclose(layer.delta_weight(), delta, atol=1e-5)  # also while merged


@methods
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_merge_and_unmerge(method, transposed, dtype):
    layer, _ = make(method, dtype=dtype, transposed=transposed)
    x = torch.randn(7, K).to(dtype)
    before, base = layer(x), layer.matrix.detach().clone()
    exact = dense_weight(layer)
    layer.merge(safe=True)
    assert layer.merged == "default" and "merged" in repr(layer)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(layer.matrix.double(), exact.to(dtype).double(), rtol=eps, atol=1e-6)  # cast once
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (layer(x) - before).norm() <= tolerance * before.norm()
    layer.merge()  # a second merge does nothing
    layer.unmerge()
    assert layer.merged is None
    if dtype == torch.float32:
        assert torch.allclose(layer.matrix, base, atol=2e-6)
    else:  # the cast of the merge is an error of half a unit of the merged weight, which DoRA's division can enlarge
        assert ((layer.matrix - base).abs() <= 2 * eps * torch.maximum(exact.abs(), base.abs().double()) + 1e-3).all()
    assert (layer(x) - before).norm() <= tolerance * before.norm()


@methods
def test_keep_base_restores_bit_for_bit(method):
    layer, _ = make(method, dtype=torch.bfloat16)
    base = layer.weight.detach().clone()
    layer.merge(keep_base=True)
    assert not torch.equal(layer.weight, base)
    layer.unmerge()
    assert torch.equal(layer.weight, base) and layer._snapshot is None


def test_dora_unmerges_with_the_norm_of_the_merge():
    layer, _ = make("dora")
    base = layer.weight.detach().clone()
    layer.merge()
    layer.norms["default"].invalidate()
    layer.unmerge()
    assert torch.allclose(layer.weight, base, atol=2e-6)


def test_dora_with_a_zero_magnitude_can_still_be_unmerged():
    layer, _ = make("dora")
    base = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_magnitude_vector["default"][3] = 0
    layer.merge(safe=True)
    assert not layer.weight[3].any()
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@methods
def test_a_safe_merge_of_a_broken_adapter_changes_nothing(method):
    layer, _ = make(method)
    base = layer.weight.detach().clone()
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="non-finite merged weights"):
        layer.merge(safe=True)
    assert torch.equal(layer.weight, base) and layer.merged is None


def test_dora_norm_is_new_after_each_step():
    layer, _ = make("dora")
    optimizer = adamw(layer, 0.05)
    x = torch.randn(9, K)
    for _ in range(3):
        assert torch.allclose(layer(x), (x.double() @ dense_weight(layer).T + bias_of(layer)).float(), atol=1e-5)
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [name for name in CONFIGS if not name.startswith(("bat", "rosa_spa", "svft"))])
def test_dropout_is_active_in_training_only_and_replayed_by_checkpointing(method):
    config = copy.copy(CONFIGS[method])
    setattr(config, next(name for name in vars(config) if name.endswith("_dropout")), 0.5)
    linear = nn.Linear(K, D)
    layer = perturb(masked(CLASSES[type(config)].from_linear(linear, config)))
    x = torch.randn(6, K, requires_grad=True)
    assert not torch.allclose(layer(x), layer(x))
    torch.manual_seed(5)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *trained(layer)])
    torch.manual_seed(5)
    again = torch.autograd.grad(
        checkpoint(layer, x, use_reentrant=False).square().sum(),
        [x, *trained(layer)],
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))
    layer.eval()
    assert torch.allclose(layer(x), (x.double() @ dense_weight(layer).T + bias_of(layer)).float(), atol=1e-5)


@methods
def test_base_agnostic_route_gives_the_same_numbers(method):
    layer, _ = make(method)
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    parameters = trained(layer)
    want = [layer(x), *torch.autograd.grad(layer(x), [x, *parameters], dy)]
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert "base-agnostic (the base layer carries hooks)" in repr(layer)
    got = [layer(x), *torch.autograd.grad(layer(x), [x, *parameters], dy)]
    handle.remove()
    assert len(calls) == 2  # the hook was honoured
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    layer.base_layer.weight.requires_grad_()  # a trained base gets its gradient
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert torch.allclose(layer(x), want[0], atol=1e-5)


@methods
def test_autocast_with_float32_adapters(method):
    layer, _ = make(method)
    x = torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    want = x.double() @ dense_weight(layer).T + bias_of(layer)
    assert (got - want).norm() <= 2e-2 * want.norm()


@methods
def test_training_after_inference_mode(method):
    layer, _ = make(method)
    x = torch.randn(6, K)
    with torch.inference_mode():
        want = layer(x)
    assert torch.allclose(layer(x), want, atol=1e-6)
    layer(x).sum().backward()
    with torch.inference_mode():
        layer, _ = make(method)
        assert torch.allclose(layer(x), (x.double() @ dense_weight(layer).T + bias_of(layer)).float(), atol=1e-5)


def test_adapter_dtype():
    for method, first in (("lora", "lora_A"), ("dora", "lora_A"), ("bone", "miss_block"), ("bat", "miss_block")):
        layer, _ = make(method, dtype=torch.bfloat16)
        assert getattr(layer, first)["default"].dtype == torch.float32
        layer, _ = make(method, dtype=torch.bfloat16, autocast_adapter_dtype=False)
        assert getattr(layer, first)["default"].dtype == torch.bfloat16
        assert layer(torch.randn(2, K).bfloat16()).dtype == torch.bfloat16
        layer, _ = make(method, dtype=torch.float64)
        assert getattr(layer, first)["default"].dtype == torch.float64
    layer, _ = make("dora", dtype=torch.bfloat16, autocast_adapter_dtype=False)
    assert layer.lora_magnitude_vector["default"].dtype == torch.float32  # in bfloat16 its changes round away


@methods
def test_copies_pickles_and_state_dicts(method):
    layer, _ = make(method)
    x = torch.randn(4, K)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
        perturb(other)
        assert torch.equal(layer(x), want)  # nothing is shared
    fresh, _ = make(method)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), want)


@methods
def test_torch_compile_has_no_graph_break(method):
    if method == "rosa_resident":
        pytest.skip("W + S in W itself is not for compiled code")
    layer, _ = make(method)
    x = torch.randn(6, K, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = layer(x), compiled(x)
    assert torch.allclose(got, want, atol=1e-6)
    parameters = trained(layer)
    wanted = torch.autograd.grad(want.square().sum(), [x, *parameters])
    gradients = torch.autograd.grad(got.square().sum(), [x, *parameters])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, wanted, strict=True))


# --- whole models ----------------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(K, D), nn.GELU(), nn.Linear(D, 12), nn.GELU(), nn.Linear(12, 6))


def on(method, **fields):
    config = copy.deepcopy(CONFIGS[method])
    for name, value in {"target_modules": ["0", "2"], **fields}.items():
        setattr(config, name, value)
    config.__post_init__()
    return config


@methods
def test_training_lowers_the_loss_and_moves_the_adapter_alone(method):
    model = mlp()
    x, target = torch.randn(32, K), torch.randn(32, 6)
    attach(model, on(method))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for path in "02" for name in trained_names(model[int(path)], path)}
    rate = 0.1 if method in ("rosa_spa", "spectral_rotation", "vera", "dvora") else 0.02
    optimizer = torch.optim.Adam(trained(model), lr=rate)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and losses[-1] == min(losses)
    for layer in so.adapter_layers(model).values():
        layer.release()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names
    # what was trained survives a merge and comes out of it again
    want = model(x)
    so.merge(model, safe=True)
    assert torch.allclose(model(x), want, atol=1e-5)
    so.unmerge(model)
    assert torch.allclose(model(x), want, atol=1e-5)
    so.merge(model)
    so.detach(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert torch.allclose(model(x), want, atol=1e-5)


@methods
def test_disabled_and_detach_give_the_original_model_back(method):
    model, x = mlp(), torch.randn(4, K)
    want = model(x)
    attach(model, on(method))
    perturb(model)
    adapted = model(x)
    assert not torch.allclose(adapted, want, atol=1e-3)
    with so.disabled(model) as same:
        assert same is model and torch.allclose(model(x), want, atol=1e-5)
        with so.disabled(model):
            pass
        assert torch.allclose(model(x), want, atol=1e-5)  # still, after the inner one
    assert torch.equal(model(x), adapted)
    with pytest.raises(KeyError), so.disabled(model):
        raise KeyError
    assert torch.equal(model(x), adapted)
    so.merge(model)
    with so.disabled(model):
        assert torch.allclose(model(x), want, atol=1e-5)
    assert so.adapter_layers(model)["0"].merged == "default"
    assert torch.allclose(model(x), adapted, atol=1e-5)
    so.unmerge(model)
    so.detach(model)
    assert torch.allclose(model(x), want, atol=1e-5)
    assert so.adapter_layers(model) == {}


SEVERAL = [
    "lora", "dora", "bone", "mini", "bat", "bat_row", "rosa", "rosa_spa", "pica", "spectral", "spectral_rotation",
    "dash", "vera", "dvora", "adalora", "adalora_dash",
]  # fmt: skip


@pytest.mark.parametrize("method", SEVERAL)
def test_several_adapters(method):
    model, x = mlp(), torch.randn(4, K)
    base = model(x)
    attach(model, on(method), "first")
    perturb(model)
    first = model(x)
    attach(model, on(method, target_modules=["2", "4"]), "second")
    perturb(model)
    second = model(x)
    assert not torch.allclose(first, second, atol=1e-3)
    so.set_adapter(model, "first")
    assert torch.equal(model(x), first)
    assert all(name.endswith((".first", ".first.weight")) for name, p in model.named_parameters() if p.requires_grad)
    so.set_adapter(model, "second")
    assert torch.equal(model(x), second)
    so.merge(model)
    with pytest.raises(ValueError, match="name: got 'first' while '2' has another adapter merged"):
        so.set_adapter(model, "first")
    so.unmerge(model)
    so.detach(model, "second")
    assert set(so.adapter_configs(model)) == {"first"} and isinstance(model[4], nn.Linear)
    so.set_adapter(model, "first")
    assert torch.allclose(model(x), first, atol=1e-6)  # layer 2 was merged and unmerged in between
    so.detach(model)
    assert torch.allclose(model(x), base, atol=1e-6)
    with pytest.raises(ValueError, match="this model has none"):
        so.set_adapter(model, "first")


def test_a_spectral_start_needs_a_layer_of_its_own():
    model = so.attach(mlp(), on("lora"), "first")
    weight = so.adapter_layers(model)["0"].weight.clone()
    with pytest.raises(ValueError, match="0: adapter_name: got a second adapter"):
        so.attach(model, on("pissa"), "second")
    assert set(so.adapter_configs(model)) == {"first"} and torch.equal(so.adapter_layers(model)["0"].weight, weight)
    model = so.attach(mlp(), on("pissa"), "first")
    with pytest.raises(ValueError, match="got a second adapter"):
        so.attach(model, on("lora"), "second")


def test_biases():
    for choice, which in (("none", []), ("lora_only", ["0", "2"]), ("all", ["0", "2", "4"])):
        model = so.attach(mlp(), on("lora", bias=choice))
        biases = [n.split(".")[0] for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]
        assert biases == which
        model(torch.randn(3, K)).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    so.attach(model, on("lora"), "second")
    assert not [n for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]


def test_modules_to_save():
    model, x = mlp(), torch.randn(3, K)
    want = model(x)
    so.attach(model, on("lora", modules_to_save=["4"]), "a")
    assert model[4].weight.requires_grad  # reads through to the copy
    perturb(model)
    first = model(x)
    so.attach(model, on("lora", modules_to_save=["4"]), "b")
    assert torch.allclose(model(x), want)
    so.set_adapter(model, "a")
    assert torch.equal(model(x), first)
    with so.disabled(model):
        assert torch.allclose(model(x), want)
    unmerged, merged = copy.deepcopy(model), so.merge(model)
    assert torch.allclose(so.detach(unmerged)(x), want)
    assert torch.allclose(so.detach(merged)(x), first, atol=1e-5)
    assert isinstance(merged[4], nn.Linear)


def test_a_layer_in_two_places_and_a_tied_weight():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Linear(8, 8), shared)
    so.attach(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)
    so.detach(model)
    assert model[0] is model[2] is shared
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="got '1', wanted no tied weight"):
        so.attach(model, LoRAConfig(r=2, target_modules=["1"], init_lora_weights="pissa"))
    so.attach(model, LoRAConfig(r=2, target_modules=["1"]))
    with pytest.raises(ValueError, match="got '1', whose weight another module shares"):
        so.merge(model)


def test_a_wrapped_model():
    model = mlp()
    so.attach(torch.compile(model, backend="eager"), on("lora"))
    assert isinstance(model[0], LoRALinear)
    with pytest.raises(TypeError, match="model: got dict"):
        so.attach({}, on("lora"))


def test_magnitude_only_layers():
    model = so.attach(mlp(), on("dora", magnitude_only=["0"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "0.lora_magnitude_vector.default" in trained and "0.lora_A.default" not in trained
    assert "2.lora_A.default" in trained


def test_importing_needs_torch_alone():
    code = """
import os, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("safetensors", "transformers", "peft", "numpy", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, spectral_ops as so
m = so.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), so.LoRAConfig(r=2, target_modules="all-linear"))
try:
    so.save_adapter(m, "never-written")
except ImportError as error:
    assert "pip install safetensors" in str(error), error
    assert not os.path.exists("never-written")
else:
    raise SystemExit("no error")
"""
    result = fresh_python(code)
    assert result.returncode == 0, result.stderr


# --- transformers' models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*\.mlp\.(up|down)_proj"}, 4),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": "all-linear", "exclude_modules": r".*self_attn.*"}, 6),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 2),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, 1),
    ],
)
def test_target_modules_as_peft_reads_them(tiny, fields, count):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**fields))
    expected = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "base_layer")}
    model = so.attach(tiny.llama(), on("lora", **fields))
    assert set(so.adapter_layers(model)) == expected and len(expected) == count


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "bone", "bat", "rosa", "pica", "dash", "vera", "dvora"])
def test_llama(tiny, method):
    model, ids = tiny.llama(), tiny.tokens()
    want = model(ids).logits
    attach(model, on(method, target_modules="all-linear"))
    assert torch.allclose(model(ids).logits, want, atol=1e-5)
    perturb(model)
    loss = tiny.loss_of(model, ids)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(model(ids).logits, want, atol=1e-4)
    so.detach(model)
    assert torch.allclose(model(ids).logits, want, atol=1e-5)


def test_patterns_of_rank_and_alpha(tiny):
    config = LoRAConfig(
        r=2, lora_alpha=4, target_modules="all-linear", rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
        alpha_pattern={"k_proj": 10},
    )  # fmt: skip
    layers = so.adapter_layers(so.attach(tiny.llama(), config))
    assert {
        p: (x.lora_A["default"].shape[0], x.settings["default"].scaling) for p, x in layers.items() if "1" in p
    } == {
        "model.layers.1.self_attn.q_proj": (3, 4 / 3),
        "model.layers.1.self_attn.k_proj": (2, 5),
        "model.layers.1.self_attn.v_proj": (2, 2),
        "model.layers.1.self_attn.o_proj": (2, 2),
        "model.layers.1.mlp.gate_proj": (2, 2),
        "model.layers.1.mlp.up_proj": (5, 4 / 5),
        "model.layers.1.mlp.down_proj": (2, 2),
    }


@methods
def test_gpt2(tiny, method):
    model, ids = tiny.gpt2().eval(), tiny.tokens()
    want = model(ids).logits
    names = ["c_attn", "c_fc"] if method.startswith("pica") else "all-linear"  # there are two sizes of c_proj
    attach(model, on(method, target_modules=names, **({"mini_r": 8} if method == "mini" else {})))
    assert len(so.adapter_layers(model)) == (8 if names == "all-linear" else 4)
    assert all(x.transposed for x in so.adapter_layers(model).values())
    assert torch.allclose(model(ids).logits, want, atol=1e-5)
    adapted = perturb(model)(ids).logits
    with so.disabled(model):
        assert torch.allclose(model(ids).logits, want, atol=1e-5)
    so.merge(model)
    assert torch.allclose(model(ids).logits, adapted, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny, reentrant):
    ids, results = tiny.tokens(), []
    for use in (False, True):
        torch.manual_seed(0)
        model = so.attach(tiny.llama(), on("dora", target_modules="all-linear", lora_dropout=0.2)).train()
        perturb(model)
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        tiny.loss_of(model, ids).backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LoRAConfig, {"r": 0}, r"LoRAConfig\.r: got 0, wanted at least 1"),
        (LoRAConfig, {"r": 2.5}, r"LoRAConfig\.r: got 2\.5 \(float\), wanted an integer"),
        (LoRAConfig, {"lora_alpha": 0}, r"lora_alpha: got 0, wanted a positive number"),
        (LoRAConfig, {"lora_dropout": 1.0}, r"lora_dropout: got 1\.0, wanted a number in \[0, 1\)"),
        (LoRAConfig, {"bias": "some"}, r"bias: got 'some', wanted one of 'none', 'all', 'lora_only'"),
        (LoRAConfig, {"init_lora_weights": "pisa"}, r"init_lora_weights: got 'pisa', wanted True, False, \"gaussian\""),
        (LoRAConfig, {"init_lora_weights": "pissa_niter_x"}, "init_lora_weights: got 'pissa_niter_x'"),
        (LoRAConfig, {"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: got 0"),
        (LoRAConfig, {"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]: got -1, wanted a positive"),
        (LoRAConfig, {"target_modules": [3]}, "target_modules: got .3., wanted a list of module names"),
        (LoRAConfig, {"target_modules": "a.*", "layers_to_transform": 1}, "layers_to_transform: got 1, wanted None"),
        (LoRAConfig, {"layers_pattern": "h"}, "layers_to_transform: got None, wanted layer indices"),
        (LoRAConfig, {"layers_to_transform": [-1]}, "layers_to_transform: got -1"),
        (LoRAConfig, {"modules_to_save": "head"}, "modules_to_save: got 'head', wanted a list"),
        (DoRAConfig, {"r": -1}, r"DoRAConfig\.r: got -1"),
        (BoneConfig, {"miss_dropout": -0.1}, r"miss_dropout: got -0\.1"),
        (BoneConfig, {"mini_r": 0}, "mini_r: got 0"),
        (BoneConfig, {"init_weights": "bat"}, r"init_weights: got 'bat', wanted True, False or \"mini\""),
        (BatConfig, {"mode": "both"}, r"BatConfig\.mode: got 'both', wanted \"col\" or \"row\""),
        (BatConfig, {"exact": 1}, "exact: got 1, wanted True or False"),
        (BoneConfig, {"bias": "lora_only"}, "wanted one of 'none', 'all', 'MiSS_only'"),
    ],
)
def test_bad_configs(config, fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(), r"got None for a model without config.model_type, .*\['0', '2', '4'\] \(3 linear layers"),
        (LoRAConfig(target_modules=["q"]), r"got \['q'\], which matches nothing; wanted .*'0', '2', '4'"),
        (LoRAConfig(target_modules=["1"]), r"matches '1' \(GELU\), wanted linear layers only"),
        (BoneConfig(r=19, target_modules=["2", "0"]), r"0: BoneConfig\.r: got 19, wanted at most in_features \(18\)"),
        (BatConfig(r=4, target_modules=["0"]), r"0: BatConfig\.r: got 4, wanted a divisor of out_features \(24\) and"),
        (BoneConfig(r=2, init_weights="mini", mini_r=7, target_modules=["0"]), r"mini_r: got 7, wanted a divisor"),
        (
            LoRAConfig(r=7, target_modules="all-linear", init_lora_weights="milora"),
            r"4: LoRAConfig\.r: got 7",
        ),
        ("lora", "config: got str, wanted one of LoRAConfig, DoRAConfig, BatConfig, BoneConfig, RoSAConfig"),
    ],
)
def test_attach_says_what_is_wrong_and_leaves_the_model_alone(config, message):
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises((TypeError, ValueError), match=message):
        so.attach(model, config)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_more_misuse():
    model = so.attach(mlp(), on("lora"))
    with pytest.raises(ValueError, match="adapter_name: got 'default', wanted a name this model does not have yet"):
        so.attach(model, on("lora"))
    for name in ("", "a.b", "keys"):
        with pytest.raises(ValueError, match="adapter_name: got"):
            so.attach(model, on("lora"), name)
    with pytest.raises(ValueError, match=r"config: got BoneConfig for '0', a LoRALinear"):
        so.attach(model, on("bone"), "other")
    deep = nn.ModuleDict({"layers": nn.Sequential(nn.ModuleDict({"q": nn.Linear(3, 3)}))})
    with pytest.raises(ValueError, match=r"got \['q'\], which matches nothing in layers 7; wanted .*'layers.0.q'"):
        so.attach(deep, LoRAConfig(target_modules=["q"], layers_to_transform=7))
    with pytest.raises(ValueError, match=r"name: got 'x', wanted one of \['default'\]"):
        so.set_adapter(model, "x")
    with pytest.raises(ValueError, match=r"adapter_name: got 'x', wanted one of"):
        so.detach(model, "x")
    with pytest.raises(TypeError, match="linear: got GELU"):
        LoRALinear.from_linear(nn.GELU(), LoRAConfig())
    with pytest.raises(TypeError, match="config: got BoneConfig, wanted LoRAConfig"):
        LoRALinear.from_linear(nn.Linear(3, 3), BoneConfig())
    with pytest.raises(ValueError, match="MultiheadAttention.forward computes with the weight of out_proj itself"):
        so.attach(nn.TransformerEncoderLayer(8, 2), LoRAConfig(r=2, target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match=r"target_modules: \['9'\] match nothing"):
        so.attach(mlp(), on("lora", target_modules=["0", "9"]))


def test_progress_of_a_slow_initialisation(capsys, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("spectral_ops.adapters.progress.time.monotonic", lambda: next(clock))
    so.attach(mlp(), on("pissa"), progress=True)
    shown = capsys.readouterr().err
    assert "LoRAConfig: layer 2/2 2" in shown and "2 layers in" in shown
    so.attach(mlp(), on("pissa"), progress=False)
    so.attach(mlp(), on("lora"), progress=True)  # nothing slow
    assert capsys.readouterr().err == ""
