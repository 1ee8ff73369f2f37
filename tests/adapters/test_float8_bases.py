"""Methods over bases in FP8: the whole gradient, against the dequantised weight in float64 (METHODS 1.11)."""

import pytest
import torch
import torch.nn.functional as F
from fp8 import BASES, CONFIGS, KERNELS, D, K, adapted, relative, torchao_layer, transformers_layer
from instruments import allocations, saved_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ops as so
from spectral_ops.adapters import float8, quantised
from spectral_ops.core.autograd import TILE_ROWS
from spectral_ops.functional import float8 as functional

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
bases = pytest.mark.parametrize("form", BASES)
methods = pytest.mark.parametrize("method", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def oracle(layer, method, product, W, x, leaves):
    """The output in float64: its value over what the base made of x, its gradient over W."""
    R = product.double() + x @ W.T - (x @ W.T).detach()
    if method == "bone":
        return R + F.pad(x, (0, -x.shape[-1] % 5)).unflatten(-1, (-1, 5)).sum(-2) @ leaves[0]
    (A, B, *rest), scale = leaves, layer.settings["default"].scaling
    z = R + scale * x @ A.T @ B.T
    if method == "rosa":
        csr = layer.csr()
        rows = torch.repeat_interleave(torch.arange(W.shape[0]), csr.row_offsets.diff().long())
        z = z + x @ torch.zeros_like(W).index_put((rows, csr.col_indices.long()), rest[0]).T
    if method == "dora":
        bias = 0 if layer.bias is None else layer.bias.double()
        z = rest[0] / (W + scale * B @ A).norm(dim=1).detach() * (z - bias) + bias
    return z


@dtypes
@methods
@bases
def test_output_and_gradients(form, method, dtype):
    base, W = BASES[form](D, K, dtype)
    net = adapted(base, method)
    layer = net[0]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, K, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, D, generator=generator).to(dtype)
    trained = [p for p in net.parameters() if p.requires_grad]
    y = net(x)
    grads = torch.autograd.grad(y, [x, *trained], dy)
    assert y.dtype == dtype and "base-agnostic" in layer.extra_repr()

    with torch.no_grad():
        product = layer.product(x)
        if form in KERNELS:
            assert torch.equal(product, base(x))  # its own kernel made it
    x64, leaves = x.detach().double().requires_grad_(), [p.detach().double().requires_grad_() for p in trained]
    bias = 0 if base.bias is None else base.bias.double()
    assert relative(product, x64.detach() @ W.T + bias) < (0.06 if form in KERNELS else EPS[dtype])
    y64 = oracle(layer, method, product, W, x64, leaves)
    want = torch.autograd.grad(y64, [x64, *leaves], dy.double())
    for got, expected in zip([y, *grads], [y64, *want], strict=True):
        assert relative(got, expected) < EPS[dtype]


@bases
def test_without_grad_and_disabled(form):
    base, W = BASES[form](D, K, torch.float32)
    net, x = adapted(base, "lora"), torch.randn(3, K)
    y = net(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(net(x), y)
    with torch.inference_mode():
        assert torch.equal(net(x), y)
    with so.disabled(net):
        plain = net(x)
        (dx,) = torch.autograd.grad(plain.sum(), x)
    assert relative(dx, torch.ones(3, D).double() @ W) < 2e-5
    assert relative(plain.detach(), x.detach().double() @ W.T + (0 if base.bias is None else base.bias.double())) < 0.06
    so.detach(net)
    assert net[0] is base


@dtypes
@methods
@pytest.mark.parametrize("form", ["transformers", "torchao_row", "torchao_row_dynamic", "compressed_block"])
def test_no_more_of_the_weight_than_a_tile(form, method, dtype, monkeypatch):
    """In a step over a weight [1024, 1024], whose tiles are [128, 1024] here, in float32 at most (DoRA's norm)."""
    monkeypatch.setitem(TILE_ROWS, "cpu", 128)
    net = adapted(BASES[form](1024, 1024, dtype)[0], method)
    x, dy = torch.randn(16, 1024).to(dtype).requires_grad_(), torch.randn(16, 1024).to(dtype)
    trained = [p for p in net.parameters() if p.requires_grad]

    def step(y=None):
        return torch.autograd.grad(net(x) if y is None else y, [x, *trained], dy)

    step()  # what a sparse pattern keeps for good
    with saved_tensors() as kept:
        y = net(x)
    so.scratch.release()
    if form in KERNELS:  # on the CPU torch's own product makes all of W in float32
        blocks = allocations(lambda: step(y))
    else:
        blocks = allocations(step)
    tile = 128 * 1024 * (4 if method == "dora" and form not in KERNELS else dtype.itemsize)
    assert max(blocks) <= max(tile, 2**18 + 2**14) < 2**20  # or a strip of 65,536 entries in float32
    assert any(n >= 128 * 1024 * dtype.itemsize for n in blocks)  # a tile was seen

    own = [x, *trained, *net[0].buffers(), *float8.read(net[0].base_layer)[:2]]
    own += [] if net[0].bias is None else [net[0].bias]
    known = {t.untyped_storage().data_ptr() for t in own}
    beside = sum(t.numel() * t.element_size() for t in kept if t.untyped_storage().data_ptr() not in known)
    y_and_gains = y.numel() * y.element_size() + 3 * 1024 * 4
    pattern = 16 * int(0.02 * 1024 * 1024)
    assert beside <= 16 * 64 * 4 + {"dora": y_and_gains, "rosa": pattern}.get(method, 0)


# --- merge, start, files ---------------------------------------------------------------------------------------------


@methods
@bases
def test_merge_and_unmerge(form, method):
    base, W = BASES[form](D, K, torch.float32)
    net = adapted(base, method)
    layer, x = net[0], torch.randn(5, K)
    before, delta = net(x), layer.delta_weight()
    stored = {n: (p, p.clone()) for n, p in base.named_parameters()}
    so.merge(net)
    want = (W + delta.double()).abs()
    got = quantised.dequantised(base).double()
    # float8_e4m3fn has three bits after the first, so it rounds by a sixteenth; below 2⁻⁶ its steps are 2⁻⁹, of 448,
    # which the largest number of a block becomes, or with a power of two as the scale no less than the half of it
    assert ((got - W - delta).abs() <= want / 16 + want.max() * 2.0**-9 / 448).all()
    assert (got - W).abs().max() > 0
    assert relative(net(x), before.double()) < 0.15
    so.unmerge(net)
    for name, p in base.named_parameters():
        assert p is stored[name][0]
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("start", ["pissa", "milora"])
@pytest.mark.parametrize("form", ["transformers", "torchao_row", "compressed_channel"])
def test_a_start_from_the_weight(form, start):
    """The base gives up what the adapter has, and is quantised anew: QPiSSA."""
    base, W = BASES[form](D, K, torch.float32)
    net = nn.Sequential(base)
    so.attach(net, so.LoRAConfig(r=8, lora_alpha=8, init_lora_weights=start, target_modules=["0"]))
    layer = net[0]
    total = layer.full_matrix() + layer.delta_weight()
    assert relative(total, W) < 0.04
    assert relative(layer.full_matrix(), W) > (0.2 if start == "pissa" else 1e-3)
    net(torch.randn(3, K)).sum().backward()
    assert layer.lora_A["default"].grad.abs().max() > 0
    so.detach(net)
    assert relative(quantised.dequantised(base), W) < 0.06


@pytest.mark.parametrize("form", ["transformers", "torchao_row_dynamic", "compressed_block"])
def test_files(form, tmp_path):
    base, _ = BASES[form](D, K, torch.float32)
    net, x = adapted(base, "dora"), torch.randn(5, K)
    so.save_adapter(net, tmp_path)
    again = so.load_adapter(nn.Sequential(BASES[form](D, K, torch.float32)[0]), tmp_path)
    assert torch.equal(again(x), net(x))


def test_what_reads_a_dense_weight_is_refused():
    with pytest.raises(ValueError, match="base_layer: got FP8Linear with a weight .*float8_e4m3fn.*Bat's W' reads it"):
        so.attach(nn.Sequential(transformers_layer(128, 256)[0]), so.BatConfig(r=8, target_modules=["0"]))


# --- inside torch ----------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("form", ["transformers", "torchao_row_dynamic"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(form, method, reentrant):
    net = adapted(BASES[form](D, K, torch.float32)[0], method)
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    results = []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        net.zero_grad()
        x.grad = None
        call(x).backward(dy)
        results.append([x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@methods
@pytest.mark.parametrize("form", ["transformers", "torchao_row", "torchao_row_dynamic", "compressed_block"])
def test_compiled(form, method):
    torch._dynamo.reset()
    net = adapted(BASES[form](D, K, torch.float32)[0], method)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    results = []
    for call in (net, compiled):
        net.zero_grad()
        x.grad = None
        y = call(x)
        y.backward(dy)
        results.append([y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < 2e-6


def test_dora_with_dropout():
    """PEFT's form: the norm's gain on the base's own share is of the dropped x."""
    base, W = transformers_layer(D, K)
    net, x = adapted(base, "dora", lora_dropout=0.4), torch.randn(2000, K)
    torch.manual_seed(1)
    y = net(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.4).double()
    A, B, m = (getattr(net[0], key)["default"].detach().double() for key in net[0].tensor_keys)
    g = m / (W + 1.5 * B @ A).norm(dim=1)
    want = x.double() @ W.T + base.bias.double() + (g - 1) * (dropped @ W.T) + g * 1.5 * (dropped @ A.T @ B.T)
    assert relative(y, want) < 1e-4


def test_autocast():
    """FP8 layers keep x's dtype under autocast, torch's products do not: so neither do those over torchao's weights."""
    x = torch.randn(6, K, requires_grad=True)
    for (base, W), dtype in ((transformers_layer(D, K), torch.float32), (torchao_layer(D, K), torch.bfloat16)):
        net = adapted(base, "lora")
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == dtype
        (dx,) = torch.autograd.grad(y.sum(), x)
        A, B = (getattr(net[0], key)["default"].detach().double() for key in ("lora_A", "lora_B"))
        assert relative(dx, torch.ones(6, D).double() @ (W + 1.5 * B @ A)) < 2e-2


def test_a_trained_bias_gets_its_gradient():
    net = adapted(transformers_layer(D, K)[0], "lora", bias="all")
    dy = torch.randn(6, D)
    net(torch.randn(6, K)).backward(dy)
    assert relative(net[0].bias.grad, dy.double().sum(0)) < 1e-5
    net = adapted(torchao_layer(D, K, dynamic=True)[0], "lora", bias="all")
    net(torch.randn(6, K)).backward(dy)
    assert relative(net[0].bias.grad, dy.double().sum(0)) < 1e-5


def test_a_hook_on_the_base_layer_sees_it_called():
    """And may change what it returns, and what that is differentiated to."""
    base, W = torchao_layer(D, K, bias=False)
    base.register_forward_hook(lambda module, args, out: 3 * out)
    net, x, dy = adapted(base, "lora"), torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    A, B = (getattr(net[0], key)["default"].detach().double() for key in ("lora_A", "lora_B"))
    (dx,) = torch.autograd.grad(net(x), x, dy)
    assert relative(dx, dy.double() @ (3 * W + 1.5 * B @ A)) < 2e-5


@pytest.mark.parametrize("dtype", functional.SCALES, ids=str)
def test_small_numbers_have_a_scale(dtype):
    """Rows whose scale float16 cannot hold: no NaN, and nothing is off by more than its row is large."""
    weight = torch.tensor([[1.0, 0.5], [1e-5, 5e-6], [1e-30, 0.0], [0.0, 0.0]])
    form = functional.blocks(torch.zeros(4, 2).to(functional.FLOAT8[0]), torch.ones(4, 1).to(dtype))
    data, scale = float8.quantise(weight, form)
    got = functional.dequantised(data, scale, 1, 2, torch.float32)
    assert got.isfinite().all() and (scale.float() > 0).all()
    assert ((got - weight).abs().amax(1) <= torch.tensor([0.1, 1e-6, 1e-30, 0.0])).all()
