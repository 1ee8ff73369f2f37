"""Over bases in FP8 and others: a gradient is whole or an error, and an unknown format is one too (METHODS 1.11)."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from fp8 import CONFIGS, Blind, D, K, adapted, compressed_layer, frozen, packed, perturb, relative, transformers_layer
from torch import nn

import spectral_ops as so
from spectral_ops.adapters import float8

pytestmark = pytest.mark.usefixtures("one_thread")
methods = pytest.mark.parametrize("method", CONFIGS)

# --- what is quietly too small elsewhere -----------------------------------------------------------------------------


def test_a_kernel_that_autograd_does_not_see_gets_the_whole_gradient():
    """Adding the adapter to what such a layer returns gives x the adapter's share u A, and nothing of dy W."""
    base = Blind(D, K)
    net, x, dy = adapted(base, "lora"), torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    A, B = (getattr(net[0], key)["default"].detach().double() for key in ("lora_A", "lora_B"))
    share = 1.5 * dy.double() @ B @ A
    composed = base(x) + 1.5 * F.linear(F.linear(x, A.float()), B.float())
    assert relative(torch.autograd.grad(composed, x, dy)[0], share) < 2e-5
    assert relative(torch.autograd.grad(net(x), x, dy)[0], share + dy.double() @ base.W) < 2e-5
    assert (dy.double() @ base.W).norm() > share.norm()


def test_a_forward_of_its_own_keeps_its_gradient():
    """A layer of another library that does more than multiply, and is differentiable: dy W is not its gradient."""

    class Tripled(Blind):
        def forward(self, x):
            return 3 * x @ self.W.to(x.dtype).t()

    base = Tripled(D, K)
    net, x, dy = adapted(base, "lora"), torch.randn(6, K, requires_grad=True), torch.randn(6, D)
    A, B = (getattr(net[0], key)["default"].detach().double() for key in ("lora_A", "lora_B"))
    wanted = dy.double() @ (3 * base.W + 1.5 * B @ A)
    assert relative(torch.autograd.grad(net(x), x, dy)[0], wanted) < 2e-5


@methods
def test_a_base_without_a_gradient_is_an_error(method):
    class Opaque(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    net = nn.Sequential(Opaque(K, D))
    so.attach(net, dataclasses.replace(CONFIGS[method], target_modules=["0"]))
    perturb(net)
    wanted = r"base_layer: got Opaque with a weight \[150, 288\] float32 on cpu, wanted a layer that is differentiable"
    with pytest.raises(ValueError, match=wanted):
        net(torch.randn(2, K, requires_grad=True))
    with so.disabled(net), pytest.raises(ValueError, match=wanted):
        net(torch.randn(2, K, requires_grad=True))
    net[0].base_layer.bias.requires_grad_()  # then the output has a gradient, but no path to x
    net[0].base_layer.forward = lambda x: F.linear(x.detach(), net[0].base_layer.weight, net[0].base_layer.bias)
    with pytest.raises(ValueError, match=wanted):
        net(torch.randn(2, K, requires_grad=True))
    net(torch.randn(2, K))  # nobody asks for x's gradient
    with torch.no_grad():
        net(torch.randn(2, K, requires_grad=True))


@methods
def test_a_base_whose_node_leaves_x_out_is_an_error(method):
    class Deaf(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x @ weight.t()

        @staticmethod
        def backward(ctx, dy):
            return None, None

    class Node(nn.Linear):
        def forward(self, x):
            return Deaf.apply(x, self.weight)

    net = nn.Sequential(nn.Linear(K, K), Node(K, D, bias=False))
    so.attach(net, dataclasses.replace(CONFIGS[method], target_modules=["1"]))
    perturb(net)
    with torch.no_grad():
        net(torch.randn(2, K))
    y = net(torch.randn(2, K, requires_grad=True))
    with pytest.raises(ValueError, match="base_layer: got Node .*, wanted a layer that is differentiable in its input"):
        y.sum().backward()


def test_a_trained_fp8_weight_is_an_error():
    net = adapted(transformers_layer(D, K)[0], "lora")
    net[0].base_layer.weight_scale_inv.requires_grad_()
    with pytest.raises(ValueError, match="scale: got requires_grad=True, wanted a frozen tensor"):
        net(torch.randn(2, K))


# --- formats that cannot be read -------------------------------------------------------------------------------------


def bare():
    layer = nn.Linear(K, D)
    layer.weight = frozen(packed(D, K, (D, K))[0])
    return layer


def with_attribute(name, value, layer):
    setattr(layer, name, value)
    return layer


UNREADABLE = {
    "no scale": (bare, "and no scale, wanted one of its own in weight_scale_inv, weight_scale"),
    "zero point": (
        lambda: with_attribute("weight_zero_point", frozen(torch.zeros(D, 1)), compressed_layer(D, K)[0]),
        "and a weight_zero_point, wanted its weight_scale alone",
    ),
    "groups of outputs": (
        lambda: with_attribute("n_groups", 2, transformers_layer(D, K)[0]),
        "wanted a layer whose outputs see all of its inputs",
    ),
    "block of another weight": (
        lambda: with_attribute("block_size", (64, 64), transformers_layer(D, K)[0]),
        r"scale: got \[2, 3\] float32 on cpu, wanted \[3, 5\] \(blocks of 64 x 64 in a weight \[150, 288\]\)",
    ),
    "blocks of no size": (
        lambda: with_attribute("quantization_scheme", None, compressed_layer(D, K, "block")[0]),
        r"scale: got \[2, 3\] float32 on cpu, wanted one number, one per row \[150\] or \[150, 1\], or a block_size",
    ),
    "scale in integers": (
        lambda: with_attribute("weight_scale", frozen(torch.ones(D, 1, dtype=torch.int32)), compressed_layer(D, K)[0]),
        r"scale: got \[150, 1\] int32 on cpu, wanted float64, float32, bfloat16, float16, float8_e8m0fnu",
    ),
}


@pytest.mark.parametrize("why", UNREADABLE)
def test_a_format_that_cannot_be_read_is_an_error(why):
    make, message = UNREADABLE[why]
    layer = make()
    with pytest.raises(ValueError, match=message):
        so.attach(nn.Sequential(layer), so.LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"base_layer: got (Linear|FP8Linear)"):
        float8.read(layer)


def test_only_the_right_shape_of_scales_is_read():
    """Every small grid of scales against every small block: read where it is the grid of the blocks, else an error."""
    d, k, layer = 6, 9, transformers_layer(6, 9, (4, 4), bias=False)[0]
    read = 0
    for rows, columns, m, n in itertools.product(range(4), range(5), (1, 2, 4, 6, 100), (1, 3, 4, 9, 100)):
        layer.block_size, layer.weight_scale_inv = (m, n), frozen(torch.ones(rows, columns))
        if (rows, columns) == (-(-d // m), -(-k // n)) or (rows, columns) == (1, 1):
            assert float8.dequantised(layer).equal(layer.weight.float())
            read += 1
        else:
            with pytest.raises(ValueError, match="base_layer: got FP8Linear"):
                float8.read(layer)
    assert read > 25


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_on_a_kernel_without_a_gradient_is_an_error(register):
    base = Blind(D, K)
    getattr(base, register)(lambda *args: None)
    net = adapted(base, "lora")
    with pytest.raises(
        ValueError, match="base_layer: got Blind with a weight .*, wanted a layer that is differentiable"
    ):
        net(torch.randn(6, K, requires_grad=True))
