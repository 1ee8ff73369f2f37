"""BatLinear beyond what every method is tested for: its inverse, what merging costs, the exact mode, the two modes."""

import json

import pytest
import torch
from torch import nn

import spectral_ops as so
from spectral_ops import BatConfig, BatLinear

MODES = ["col", "row"]
modes = pytest.mark.parametrize("mode", MODES)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(mode="col", d=24, k=36, r=6, dtype=torch.float32, scale=0.05, **options):
    linear = nn.Linear(k, d).to(dtype)
    layer = BatLinear.from_linear(linear, BatConfig(r=r, mode=mode, **options))
    with torch.no_grad():
        layer.miss_block["default"].normal_(std=scale)
    return layer


def changed(weight, block, mode):
    """W' in float64, block by block."""
    (d, k), r = weight.shape, block.shape[-1]
    W, B, out = weight.double(), block.double(), torch.empty(d, k, dtype=torch.float64)
    for o in range(d // r):
        for j in range(k // r):
            b, place = B[o if mode == "col" else j], (slice(o * r, (o + 1) * r), slice(j * r, (j + 1) * r))
            out[place] = W[place] @ (torch.eye(r, dtype=torch.float64) + b) + b
    return out


@modes
@pytest.mark.parametrize(("d", "k", "r"), [(24, 36, 6), (36, 24, 12), (20, 10, 5), (7, 7, 7), (6, 9, 1)])
def test_block_sizes(mode, d, k, r):
    layer = make(mode, d, k, r)
    assert layer.miss_block["default"].shape == ((d if mode == "col" else k) // r, r, r)
    want = changed(layer.weight, layer.miss_block["default"], mode)
    for T in (1, r - 1, 40):
        x = torch.randn(T, k)
        assert torch.allclose(layer(x).double(), x.double() @ want.T + layer.bias.double(), atol=1e-5)
    assert torch.allclose(layer.delta_weight().double(), want - layer.weight.double(), atol=1e-6)
    base = layer.weight.detach().clone()
    layer.merge()
    assert torch.allclose(layer.weight.double(), want, atol=1e-6)
    layer.unmerge()
    assert torch.allclose(layer.weight, base, atol=2e-6)


@modes
@pytest.mark.parametrize("block", [0, 3])
def test_a_singular_block_is_an_error_before_anything_changes(mode, block):
    model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    so.attach(model, BatConfig(r=6, mode=mode, target_modules=["0", "2"]))
    base = [layer.weight.detach().clone() for layer in so.adapter_layers(model).values()]
    layer = model[2]
    with torch.no_grad():
        for other in so.adapter_layers(model).values():
            other.miss_block["default"].normal_(std=0.05)
        layer.miss_block["default"][block] = torch.ones(6, 6) - torch.eye(6)  # I + B has rank 1
    message = rf"miss_block\['default'\]: got a singular I \+ B in block {block} of 4, wanted invertible"
    with pytest.raises(ValueError, match=message):
        layer.merge()
    with pytest.raises(ValueError, match=r"2: " + message):
        so.merge(model)
    assert not any(unit.merged for unit in so.adapter_layers(model).values())
    assert all(
        torch.equal(unit.weight, w) for unit, w in zip(so.adapter_layers(model).values(), base, strict=True)
    )  # the first layer's too
    so.merge(model, keep_base=True, safe=True)
    x = torch.randn(3, 24)
    assert torch.isfinite(model(x)).all()
    so.unmerge(model)
    assert all(torch.equal(unit.weight, w) for unit, w in zip(so.adapter_layers(model).values(), base, strict=True))


@modes
def test_a_block_that_became_singular_while_merged(mode):
    layer = make(mode)
    layer.merge()
    merged = layer.weight.detach().clone()
    good = layer.miss_block["default"].detach().clone()
    for bad in (-torch.eye(6), torch.full((6, 6), float("nan"))):
        with torch.no_grad():
            layer.miss_block["default"][1] = bad
        with pytest.raises(ValueError, match="singular I . B in block 1 of"):
            layer.unmerge()
        assert layer.merged == "default" and torch.equal(layer.weight, merged)
    with torch.no_grad():
        layer.miss_block["default"].copy_(good)
    layer.unmerge()
    assert layer.merged is None and torch.isfinite(layer.weight).all()


def test_nearly_singular_is_singular_in_float32_only():
    block = torch.ones(6, 6, dtype=torch.float64) - (1 - 1e-9) * torch.eye(6, dtype=torch.float64)
    for dtype, fails in ((torch.float32, True), (torch.float64, False)):
        layer = make(dtype=dtype)
        base = layer.weight.detach().clone()
        with torch.no_grad():
            layer.miss_block["default"][2] = block
        if fails:
            with pytest.raises(ValueError, match="block 2 of 4"):
                layer.merge()
        else:
            layer.merge()
            layer.unmerge()
            assert torch.allclose(layer.weight, base, atol=1e-5)


def cycles(layer, count, **options):
    """Relative drift of the weight over ``count`` merges and unmerges."""
    base = layer.weight.detach().double()
    for _ in range(count):
        layer.merge(**options)
        layer.unmerge()
    return ((layer.weight.double() - base).norm() / base.norm()).item()


@modes
def test_a_kept_base_does_not_drift_in_100_cycles(mode):
    layer = make(mode, 48, 48, 8, torch.bfloat16)
    base = layer.weight.detach().clone()
    assert cycles(layer, 100, keep_base=True) == 0.0
    assert torch.equal(layer.weight, base)


@modes
def test_without_a_copy_one_cycle_errs_by_its_two_roundings(mode):
    """W' is rounded by half a unit, which (I + B)⁻¹ passes on, and the result by half a unit again."""
    layer = make(mode, 48, 48, 8, torch.bfloat16)
    base = layer.weight.detach().double()
    inverse = torch.linalg.inv(torch.eye(8).double() + layer.miss_block["default"].detach().double()).abs()
    half = torch.finfo(torch.bfloat16).eps / 2
    rounding = half * layer._by_block(changed(layer.weight, layer.miss_block["default"], mode).abs(), "default")
    bound = layer._by_rows(torch.einsum("nabc,nce->nabe", rounding, inverse), "default")
    layer.merge()
    layer.unmerge()
    after = layer.weight.detach().double()
    assert ((after - base).abs() <= bound * 1.01 + half * after.abs() + 1e-6).all()


def test_drift_beside_pefts():
    """With bfloat16 blocks PEFT rounds the change before it is added, and the inverse; ours rounds the weight alone."""
    peft = pytest.importorskip("peft")
    base, options = nn.Linear(64, 64, bias=False).bfloat16(), {"autocast_adapter_dtype": False}
    layer = BatLinear.from_linear(nn.Linear(64, 64, bias=False).bfloat16(), BatConfig(r=16), **options)
    config = peft.MissConfig(r=16, init_weights="bat", target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config, **options).base_model.model[0]
    with torch.no_grad():
        theirs.miss_block["default"].normal_(std=0.1)
        layer.miss_block["default"].copy_(theirs.miss_block["default"])
        layer.base_layer.weight.copy_(base.weight)
    before = base.weight.detach().double()
    for _ in range(100):
        theirs.merge()
        theirs.unmerge()
    drift = ((base.weight.double() - before).norm() / before.norm()).item()
    ours = cycles(layer, 100)
    print(f"relative drift of a bfloat16 weight after 100 cycles: ours {ours:.3g}, PEFT {drift:.3g}")
    assert ours < drift / 1.5


@modes
@pytest.mark.parametrize("exact", [False, True])
def test_the_operator_gets_the_mode_and_exactness_of_the_config(mode, exact):
    layer, x = make(mode, dtype=torch.bfloat16, exact=exact), torch.randn(9, 36).bfloat16()
    with torch.no_grad():
        block = layer.miss_block["default"]
        assert torch.equal(layer(x), so.bat_linear(x, layer.weight, block, layer.bias, mode=mode, exact=exact))


@modes
def test_the_delta_of_a_bf16_base_is_not_rounded(mode):
    layer = make(mode, dtype=torch.bfloat16, scale=1e-4)
    want = changed(layer.weight, layer.miss_block["default"], mode) - layer.weight.double()
    assert torch.allclose(layer.delta_weight().double(), want, rtol=1e-5, atol=1e-9)


@modes
def test_the_base_agnostic_route_trains_the_base_too(mode):
    layer, x = make(mode), torch.randn(9, 36)
    layer.base_layer.weight.requires_grad_()
    got = torch.autograd.grad(layer(x).square().sum(), [layer.base_layer.weight, layer.miss_block["default"]])
    weight = layer.base_layer.weight.detach().double().requires_grad_()
    block = layer.miss_block["default"].detach().double().requires_grad_()
    r, out = 6, []
    for o, rows in enumerate(weight.split(r)):
        bs = [block[o if mode == "col" else j] for j in range(36 // r)]
        out.append(torch.cat([w + w @ b + b for w, b in zip(rows.split(r, 1), bs, strict=True)], 1))
    y = x.double() @ torch.cat(out).T + layer.bias.double()
    want = torch.autograd.grad(y.square().sum(), [weight, block])
    assert all(torch.allclose(g.double(), w, rtol=1e-4, atol=1e-4) for g, w in zip(got, want, strict=True))


def test_a_quantised_base_is_refused_with_the_reason():
    bnb = pytest.importorskip("bitsandbytes")
    for layer in (
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ):
        layer.load_state_dict(nn.Linear(64, 64).state_dict())
        model = nn.Sequential(layer.to("cpu"))
        with pytest.raises(ValueError, match=r"0: base_layer: got Linear.*, wanted a floating-point .*Bat's W' reads"):
            so.attach(model, BatConfig(r=8, target_modules=["0"]))
        assert model[0] is layer


def test_files_say_the_mode_only_where_peft_must_not_read_them(tmp_path):
    for mode, peft_type in (("col", "MISS"), ("row", "BAT_ROW")):
        model = so.attach(nn.Sequential(nn.Linear(12, 18)), BatConfig(r=6, mode=mode, target_modules=["0"]))
        so.save_adapter(model, tmp_path / mode)
        fields = json.loads((tmp_path / mode / "adapter_config.json").read_text())
        assert (fields["peft_type"], fields["init_weights"]) == (peft_type, "bat")
        assert ("mode" in fields, "exact" in fields) == (mode == "row", mode == "row")
        again = so.load_adapter(nn.Sequential(nn.Linear(12, 18)), tmp_path / mode, check_base=False)
        assert so.adapter_configs(again)["default"].mode == mode
    # mistaken for the other mode, a file does not fit a layer that is not square
    path = tmp_path / "row" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mode": "col"}))
    with pytest.raises(ValueError, match=r"miss_block \[2, 6, 6\], wanted \[3, 6, 6\]"):
        so.load_adapter(nn.Sequential(nn.Linear(12, 18)), tmp_path / "row", check_base=False)
