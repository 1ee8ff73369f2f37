"""SVFT's layers: the four patterns, what trains, files, and PiCa beside it."""

import pytest
import torch
from torch import nn

import spectral_ops as so
from spectral_ops import SVFTConfig, SVFTLinear
from spectral_ops.bench import counting

PATTERNS = {
    "plain": {"off_diag": 0},
    "banded": {"off_diag": 2},
    "random": {"pattern": "random", "off_diag": 1, "seed": 3},
    "top_k": {"pattern": "top_k", "off_diag": 1},
    "truncated": {"off_diag": 1, "r": 7},
}
patterns = pytest.mark.parametrize("pattern", PATTERNS)


def layer(pattern, d=18, k=18, dtype=torch.float64, **fields):
    linear = nn.Linear(k, d, dtype=dtype)
    made = SVFTLinear.from_linear(linear, SVFTConfig(**PATTERNS[pattern], **fields))
    with torch.no_grad():
        made.svft_values["default"].normal_()
    return made


def dense(made):
    return made.csr().to_dense().detach()


@patterns
def test_the_formula_and_its_gradients(pattern):
    made = layer(pattern)
    x = torch.randn(2, 5, 18, dtype=torch.float64, requires_grad=True)
    made(x).square().sum().backward()
    got = x.grad, made.svft_values["default"].grad
    M = dense(made).requires_grad_()
    again = x.detach().requires_grad_()
    W = made.weight + made.svft_U["default"] @ M @ made.svft_Vh["default"]
    y = nn.functional.linear(again, W, made.bias)
    y.square().sum().backward()
    places = dense(made) != 0
    torch.testing.assert_close(got, (again.grad, M.grad[places]))
    torch.testing.assert_close(made.delta_weight(), (W - made.weight).detach())


def test_which_entries_train():
    assert torch.equal(dense(layer("plain")) != 0, torch.eye(18, dtype=torch.bool))
    rows, columns = torch.meshgrid(torch.arange(18), torch.arange(18), indexing="ij")
    assert torch.equal(dense(layer("banded")) != 0, (rows - columns).abs() <= 2)
    drawn = layer("random")
    assert torch.equal(dense(drawn) != 0, dense(layer("random")) != 0)  # from the seed, not from torch's generator
    other = SVFTLinear.from_linear(nn.Linear(18, 18), SVFTConfig(pattern="random", off_diag=1, seed=4))
    assert not torch.equal(other.svft_col_indices["default"], drawn.svft_col_indices["default"])
    alike = layer("top_k")
    products = alike.svft_U["default"].t() @ alike.svft_Vh["default"].t()
    chosen = dense(alike) != 0
    assert products[chosen].min() >= products[~chosen].max()
    counts = {name: layer(name).svft_values["default"].numel() for name in PATTERNS}
    assert counts == {"plain": 18, "banded": 84, "random": 52, "top_k": 52, "truncated": 19}


@pytest.mark.parametrize(("d", "k"), [(12, 30), (30, 12)])
def test_weights_that_are_not_square(d, k):
    made = layer("banded", d, k)
    assert made.svft_U["default"].shape == (d, 12) and made.svft_Vh["default"].shape == (12, k)
    x = torch.randn(3, k, dtype=torch.float64)
    W = made.weight + made.svft_U["default"] @ dense(made) @ made.svft_Vh["default"]
    torch.testing.assert_close(made(x), nn.functional.linear(x, W, made.bias))
    with pytest.raises(ValueError, match=r"SVFTConfig.pattern: got 'top_k', wanted .* that is not square"):
        layer("top_k", d, k)


@patterns
def test_a_fresh_adapter_changes_nothing_and_a_file_gives_all_back(pattern, tmp_path):
    net = nn.Sequential(nn.Linear(18, 18), nn.GELU(), nn.Linear(18, 18))
    x = torch.randn(4, 18)
    before = net(x)
    so.attach(net, SVFTConfig(**PATTERNS[pattern], target_modules=["0", "2"]))
    assert torch.equal(net(x), before)
    for made in (net[0], net[2]):
        nn.init.normal_(made.svft_values["default"])
    changed = net(x)
    so.save_adapter(net, tmp_path)
    so.detach(net)
    assert torch.equal(net(x), before)
    so.load_adapter(net, tmp_path)
    assert torch.equal(net(x), changed)
    so.merge(net)
    torch.testing.assert_close(net(x), changed, rtol=1e-4, atol=1e-5)
    so.unmerge(net)
    torch.testing.assert_close(net(x), changed, rtol=1e-4, atol=1e-5)


def test_over_a_base_that_must_be_called():
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 48, bias=False)
    base = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    base.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    made = SVFTLinear.from_linear(base, SVFTConfig(off_diag=1))
    with torch.no_grad():
        made.svft_values["default"].normal_()
    x = torch.randn(5, 64, requires_grad=True)
    y = made(x)
    M = dense(made).requires_grad_()
    again = x.detach().requires_grad_()
    expected = base(again) + again @ (made.svft_U["default"] @ M @ made.svft_Vh["default"]).T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.svft_values["default"].grad, M.grad[dense(made) != 0], rtol=1e-3, atol=1e-3)


def test_pica_holds_less_than_svft():
    """The claim of PiCa's paper: SVFT keeps both sides whole and h over all of them, PiCa one side of r columns."""
    n, T, r = 64, 32, 4
    x = torch.randn(T, n, requires_grad=True)
    held, saved = {}, {}
    for config in (so.PiCaConfig(r=r), SVFTConfig(off_diag=1)):
        linear = nn.Linear(n, n)
        kind = type(config).__name__
        made = so.adapters.methods.layer_type(config).from_linear(linear, config)
        tensors = {id(t): t for t in (*made.parameters(), *made.buffers())}
        known = {id(t) for t in linear.parameters()}
        held[kind] = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in known)
        saved[kind] = counting.saved_bytes(made, x, [t.detach() for t in tensors.values()])
    nnz = SVFTConfig(off_diag=1).nnz(n)
    assert held == {"PiCaConfig": 4 * 2 * n * r, "SVFTConfig": 4 * (2 * n * n + nnz + n + 1 + nnz)}
    assert saved == {"PiCaConfig": 4 * T * r, "SVFTConfig": 4 * T * n}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "diagonal"}, r"SVFTConfig\.pattern: got 'diagonal', wanted one of 'banded', 'random', 'top_k'"),
        ({"off_diag": -1}, r"SVFTConfig\.off_diag: got -1, wanted at least 0"),
        ({"seed": -1}, r"SVFTConfig\.seed: got -1"),
        ({"r": 0}, r"SVFTConfig\.r: got 0"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        SVFTConfig(**fields)
    with pytest.raises(ValueError, match=r"SVFTConfig\.r: got 19, wanted at most 18"):
        SVFTLinear.from_linear(nn.Linear(18, 18), SVFTConfig(r=19))
