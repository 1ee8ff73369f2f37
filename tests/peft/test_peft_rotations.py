"""What is particular to PEFT's OFT, BOFT and HRA layers: their other configurations, several adapters, what is left to
PEFT. test_peft_tuners.py holds their defaults to the contract of all tuners."""

import copy
from contextlib import nullcontext

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from instruments import saved_tensors  # noqa: E402
from peft.tuners.boft import layer as boft  # noqa: E402
from peft_tiny import worst  # noqa: E402

import spectral_ops  # noqa: E402
from spectral_ops import accelerate  # noqa: E402
from spectral_ops.bench.tuners import perturb  # noqa: E402
from spectral_ops.functional import rotation  # noqa: E402

EXACT = 5e-6
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*CUDA|.*butterfly|.*symmetric"),
]
K, D = 48, 32


class Blocks:
    """PEFT's extension for BOFT's factors, without CUDA: blocks on a diagonal, and back."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        b = blocks.shape[-1]
        parts = [torch.stack([g[i : i + b, i : i + b] for i in range(0, len(g), b)]) for g in grad]
        return [torch.stack(parts)]


def build(config, base=None, dtype=torch.float32):
    torch.manual_seed(0)
    base = torch.nn.Linear(K, D) if base is None else base
    return perturbed(peft.get_peft_model(torch.nn.Sequential(base), config).to(dtype))


def perturbed(model):
    perturb(model, 0.05)
    return model.train()


def outcome(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "dx": x.grad, **grads}


def fused(model):
    report = accelerate(model)
    assert report.counts["PEFT"] == 0 and report.rows, str(report)
    return model


def compare(plain, T=7, dtype=torch.float32, tolerance=EXACT):
    ours = fused(copy.deepcopy(plain))
    for shape in ((T,), (2, 3)):
        x = torch.randn(*shape, K, dtype=dtype)
        assert worst(outcome(plain, x), outcome(ours, x)) < tolerance
    assert not spectral_ops.report(ours).fallbacks()
    return ours


def oft(**fields):
    return peft.OFTConfig(target_modules=["0"], **{"oft_block_size": 8, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"use_cayley_neumann": False},
        {"num_cayley_neumann_terms": 2},
        {"num_cayley_neumann_terms": 3},
        {"num_cayley_neumann_terms": 8},
        {"block_share": True},
        {"block_share": True, "use_cayley_neumann": False},
        {"oft_block_size": 0, "r": 4},
        {"module_dropout": 0.5},  # which PEFT's linear layer never applies
        {"init_weights": False},
        {"coft": True, "eps": 1e-2},
        {"coft": True, "eps": 10.0},
    ],
    ids=str,
)
def test_oft(fields):
    compare(build(oft(**fields)))
    compare(build(oft(**fields), dtype=torch.float64), dtype=torch.float64, tolerance=1e-11)


@pytest.mark.parametrize("terms", [0, 2, 5])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "x", "blocks"])
def test_wide_blocks(terms, trained, monkeypatch):
    """They meet the library's products, not the kernel's; both are the same numbers, and the compiled layer's. Shared
    blocks too."""
    torch.manual_seed(0)
    b, need_x, need_blocks = rotation.WIDE, *trained
    for n in (1, 2):
        x, weight = torch.randn(3, 2 * b, dtype=torch.float64), torch.randn(4, 2 * b, dtype=torch.float64)
        triangles = 0.01 * torch.randn(n, b * (b - 1) // 2, dtype=torch.float64)
        found = []
        for backend, wide in (("reference", b), ("reference", b + 1), (None, b)):
            monkeypatch.setattr(rotation, "WIDE", wide)  # of the layer in Python
            u, v = x.clone().requires_grad_(need_x), triangles.clone().requires_grad_(need_blocks)
            with torch.profiler.profile() as profile, spectral_ops.use_backend(backend) if backend else nullcontext():
                y = rotation.rotation_linear(u, weight, v, terms=terms)
                y.square().sum().backward()
            if backend:
                assert any("bat_mix" in event.key for event in profile.key_averages()) == (wide > b)
            assert (u.grad is not None, v.grad is not None) == trained
            results = {"y": y.detach(), "dx": u.grad, "dblocks": v.grad}
            found.append({key: t for key, t in results.items() if t is not None})
        for got in found[1:]:
            assert worst(found[0], got) < 1e-12


def test_a_series_of_one_term_is_left_to_peft():
    """Its parameters take no gradient there, not one of zeros."""
    ours = build(oft(num_cayley_neumann_terms=1))
    accelerate(ours)
    assert outcome(ours, torch.randn(3, K))["base_model.model.0.oft_R.default.weight"] is None
    assert "trains nothing" in spectral_ops.report(ours).fallbacks()[0].reason


def test_coft_projects_the_parameters_as_peft_does():
    """In place in every call; two calls before one backward pass are two projections of the same numbers."""
    plain = build(oft(coft=True, eps=1e-3))
    ours = fused(copy.deepcopy(plain))
    x = torch.randn(5, K)
    for model in (plain, ours):
        (model(x).square().sum() + model(2 * x).square().sum()).backward()
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (plain, ours)]
    assert worst(*({n: p.detach() for n, p in t.items()} for t in trained)) < EXACT
    assert worst(*({n: p.grad for n, p in t.items()} for t in trained)) < EXACT


@pytest.mark.parametrize(
    "fields", [{"boft_block_size": 3}, {"boft_block_size": 0, "boft_block_num": 6}, {"init_weights": False}], ids=str
)
def test_boft(fields):
    compare(build(peft.BOFTConfig(target_modules=["0"], **fields)))


@pytest.fixture
def with_factors(monkeypatch):
    """More than one butterfly factor needs PEFT's CUDA extension: here the same in torch."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: Blocks)


@pytest.mark.parametrize(("size", "factors"), [(8, 2), (2, 2), (4, 3), (6, 4), (2, 4)])
def test_butterfly_factors(size, factors, with_factors):
    config = peft.BOFTConfig(target_modules=["0"], boft_block_size=size, boft_n_butterfly_factor=factors)
    plain = build(config)
    assert plain.base_model.model[0].boft_R["default"].shape[0] == factors
    compare(plain)
    ours = fused(copy.deepcopy(plain)).eval()
    x = torch.randn(5, K)
    with torch.no_grad():
        want = ours(x)
        ours.merge_adapter()
        assert worst({"y": want}, {"y": ours(x)}) < EXACT
        ours.unmerge_adapter()
        assert worst({"y": want}, {"y": ours(x)}) < 1e-5


def test_wide_butterflies_are_left_to_peft(with_factors):
    config = peft.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=8)
    model = build(config, torch.nn.Linear(512, 4))
    accelerate(model)
    (fallback,) = spectral_ops.report(model).rows
    assert fallback.path == "PEFT" and "mix 512 features, more than 256" in fallback.reason


def test_boft_dropout():
    """It replaces blocks while it trains: that is left to PEFT, by the flag of the call."""
    plain = build(peft.BOFTConfig(target_modules=["0"], boft_dropout=0.5)).eval()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    x = torch.randn(5, K)
    assert worst(outcome(plain, x), outcome(ours, x)) < EXACT
    assert not spectral_ops.report(ours).fallbacks()
    for model in (plain, ours):
        model.train()
    found = []
    for model in (plain, ours):
        torch.manual_seed(3)
        found.append(outcome(model, x))
    assert worst(*found) == 0
    (fallback,) = spectral_ops.report(ours).fallbacks()
    assert "boft_dropout is active" in fallback.reason


def test_boft_saves_no_result_where_its_scales_are_frozen():
    model = fused(build(peft.BOFTConfig(target_modules=["0"])))
    layer = model.base_model.model[0]
    x = torch.randn(9, K, requires_grad=True)
    for trained in (True, False):
        layer.boft_s["default"].requires_grad_(trained)
        with saved_tensors() as kept:
            model(x)
        assert any(t.shape == (9, D) for t in kept) == trained


@pytest.mark.parametrize(
    "fields",
    [{"r": 3}, {"r": 8, "init_weights": False}, {"r": 4, "apply_GS": True, "init_weights": False}, {"apply_GS": True}],
    ids=str,
)
def test_hra(fields):
    config = peft.HRAConfig(target_modules=["0"], **fields)
    plain = build(config)
    compare(plain, tolerance=5e-5 if fields == {"apply_GS": True} else EXACT)  # columns that nearly repeat
    if fields != {"apply_GS": True}:
        compare(build(config, dtype=torch.float64), dtype=torch.float64, tolerance=1e-11)


CONFIGS = {
    "OFT": lambda **fields: oft(**fields),
    "BOFT": lambda **fields: peft.BOFTConfig(target_modules=["0"], **fields),
    "HRA": lambda **fields: peft.HRAConfig(target_modules=["0"], **fields),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_several_adapters_in_their_order(name):
    """Also of other sizes where PEFT takes them: each rotates what the one before left."""
    other = {"OFT": {"oft_block_size": 6}, "BOFT": {"boft_block_size": 6}, "HRA": {"r": 3, "init_weights": False}}[name]
    plain = build(CONFIGS[name]())
    plain.add_adapter("other", CONFIGS[name](**other))
    plain.base_model.set_adapter(["default", "other"])
    perturbed(plain)
    ours = compare(plain)
    for model in (plain, ours):
        model.base_model.set_adapter(["other", "default"])
        perturb(model, 0.0)
    x = torch.randn(4, K)
    assert worst(outcome(plain, x), outcome(ours, x)) < EXACT
    if name == "HRA":
        for model in (plain, ours):
            model.base_model.model[0].hra_apply_GS["other"] = True
        assert worst(outcome(plain, x), outcome(ours, x)) < EXACT
        assert "apply_GS" in spectral_ops.report(ours).fallbacks()[-1].reason


class Doubled(torch.nn.Linear):
    """A base layer that is called, as a quantised one would be."""

    def forward(self, x):
        return 2 * torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["OFT", "BOFT"])
def test_over_a_base_layer_that_is_called(name, bias):
    plain = build(CONFIGS[name](), Doubled(K, D, bias=bias))
    if name == "BOFT" and "x_rotated" not in boft.Linear.forward.__code__.co_varnames:
        (row,) = accelerate(plain).rows
        assert "past the base layer" in row.reason
        return
    ours = compare(plain)
    (row,) = spectral_ops.report(ours).rows
    assert "rotate" in row.operators and "rotation_linear" not in row.operators


def test_hra_reads_the_weight_past_the_base_layer():
    plain = build(CONFIGS["HRA"](), Doubled(K, D))
    ours = compare(plain)
    (row,) = spectral_ops.report(ours).rows
    assert "householder_linear" in row.operators


def test_convolutions_are_left_to_peft():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1))
    for name in CONFIGS:
        config = CONFIGS[name](**({"oft_block_size": 4} if name == "OFT" else {}))
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        report = accelerate(adapted)
        assert all(row.path == "PEFT" for row in report.rows), str(report)
