"""Operators and PEFT layers inside other machinery of torch: copies, pickles, threads, tracing, streams."""

import copy
import io
import types

import pytest
import torch

import spectral_ops
from spectral_ops.functional import NormCache, blocksum, bone_update, lowrank_update

T, D, K, R = 6, 8, 10, 3


def tensors():
    generator = torch.Generator().manual_seed(0)
    x, W, A, B = (torch.randn(*s, generator=generator) for s in ((T, K), (D, K), (R, K), (D, R)))
    return x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_()


def bone(x, W, A, B):
    return spectral_ops.bone_linear(x, W, B.t())


def dora(x, W, A, B, **options):
    return spectral_ops.dora_linear(x, W, A, B, W.norm(dim=1).requires_grad_(), **options)


CALLS = {
    "lora": spectral_ops.lowrank_linear,
    "lora, scaled": lambda *t: spectral_ops.lowrank_linear(*t, out_scale=torch.linspace(0.5, 1, D)),
    "lora, dropout": lambda *t: spectral_ops.lowrank_linear(*t, dropout_p=0.5, training=True),
    "update": lambda x, W, A, B: lowrank_update(x @ W.t(), x, A, B),
    "group": lambda x, W, A, B: spectral_ops.lowrank_linear_group(x, [(W, A, B, None, 1.0), (W, A, B, None, 2.0)])[1],
    "dora": dora,
    "dora, recomputed": lambda *t: dora(*t, recompute=True),
    "dora, dropout": lambda *t: dora(*t, dropout_p=0.5, training=True),
    "bone": bone,
}


@pytest.mark.parametrize("name", CALLS)
def test_backward_started_inside_autocast_is_that_of_its_forward(name):
    inputs = tensors()
    y = CALLS[name](*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    trained = inputs[2:] if name == "update" else (inputs[0], inputs[3])  # update's base product is torch's own
    expected = torch.autograd.grad(y, trained, dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, trained, dy)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and torch.equal(g, e)


def test_base_output_of_inference_mode_is_copied():
    x, W, A, B = tensors()
    with torch.inference_mode():
        base = x @ W.t()
    kept = base.clone()
    y = lowrank_update(base, x, A, B)
    y.sum().backward()
    assert torch.equal(base, kept) and A.grad is not None
    torch.testing.assert_close(y, spectral_ops.lowrank_linear(x, W, A, B))


@pytest.mark.parametrize("call", [lambda y, x: lowrank_update(y, x, *tensors()[2:]), lambda y, x: bone_update(y, x, y)])
def test_scalar_x_is_named(call):
    with pytest.raises(ValueError, match="^x: got"):
        call(torch.randn(D), torch.tensor(1.0))


def test_norm_of_another_weight_at_the_same_address():
    cache = NormCache()
    for i in range(20):  # freed each time round, so that the allocator hands its address out again
        weight, A, B = torch.full((64, 64), i + 1.0), torch.zeros(R, 64), torch.zeros(64, R)
        torch.testing.assert_close(cache.get(weight, A, B, 1.0), torch.full((64,), 8 * (i + 1.0)))
        del weight, A, B


def test_scale_may_change_under_compile():
    x, W, A, B = tensors()
    compiled = torch.compile(
        lambda s: spectral_ops.lowrank_linear(x, W, A, B, scale=s), backend="aot_eager", fullgraph=True
    )
    for scale in (1.0, 2.0, 3.5):
        torch.testing.assert_close(compiled(scale), spectral_ops.lowrank_linear(x, W, A, B, scale=scale))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shard_offsets_are_copied_to_the_gpu_once():
    x, W = torch.randn(T, K, device="cuda"), torch.randn(D, K, device="cuda")
    matrix = torch.randn(3, D, device="cuda")
    spectral_ops.disha_linear(x, W, matrix, [2, 3, 5])
    torch.cuda.set_sync_debug_mode("error")
    try:
        spectral_ops.disha_linear(x, W, matrix, [2, 3, 5])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shard_offsets():
    assert blocksum._offsets([2, 3, 5], torch.device("cpu")).tolist() == [0, 2, 5, 10]
    assert blocksum._offsets("cyclic", torch.device("cpu")) is None


# --- accelerated PEFT layers -----------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def models(request):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Linear(12, 16))
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], use_dora=request.param, init_lora_weights=False)
    plain = peft.get_peft_model(base, config).eval()
    fused = copy.deepcopy(plain)
    return plain, fused, spectral_ops.accelerate(fused)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_can_be_saved(models):
    plain, fused, report = models
    x, file = torch.randn(5, 16), io.BytesIO()
    torch.jit.save(torch.jit.trace(fused, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), plain(x))
    assert any("torch.jit.trace" in fallback.reason for fallback in report.fallbacks())


def test_torch_func_runs_peft(models):
    plain, fused, report = models
    x, name = torch.randn(5, 16), "base_model.model.0.lora_A.default.weight"

    def gradient(model):
        def loss(A):
            return torch.func.functional_call(model, {name: A}, (x,)).square().sum()

        return torch.func.grad(loss)(dict(model.named_parameters())[name].detach())

    torch.testing.assert_close(gradient(fused), gradient(plain))
    batch = torch.randn(3, 5, 16)
    torch.testing.assert_close(torch.func.vmap(fused)(batch), plain(batch))
    assert all("torch.func" in fallback.reason for fallback in report.fallbacks())


def test_forward_mode_runs_peft(models):
    plain, fused, _ = models
    x = torch.randn(5, 16)
    tangents = [torch.func.jvp(lambda x, m=m: m(x), (x,), (x,))[1] for m in (plain, fused)]
    torch.testing.assert_close(*tangents)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent, tangents[0])


def test_a_layer_whose_forward_was_replaced_is_reported(models):
    plain, _, _ = models
    layer = plain.base_model.model[0]
    original = layer.forward
    layer.forward = types.MethodType(lambda self, x: original(x), layer)  # as accelerate's add_hook_to_module does
    with pytest.raises(RuntimeError, match="its own forward was replaced"):
        spectral_ops.accelerate(plain, strict=True)
    report = spectral_ops.accelerate(plain)
    assert report.counts["PEFT"] == 1 and report.counts["fused"] == 1
    del layer.forward
    assert spectral_ops.accelerate(plain, strict=True).counts["fused"] == 2


def test_explain_takes_a_public_function():
    choice = spectral_ops.explain("dora_linear", torch.zeros(1))
    assert choice.operator == "dora_linear" and "column_norm" in choice.reason
    assert spectral_ops.explain("block_sum").operator == "block_sum"
    with pytest.raises(ValueError, match="op: got 'nonsense', wanted one of .*block_sum"):
        spectral_ops.explain("nonsense")


def test_unused_and_frozen_siblings_cost_no_gradient():
    x = torch.randn(6, 10, requires_grad=True)
    used = [torch.randn(8, 10), torch.randn(4, 10, requires_grad=True), torch.randn(8, 4, requires_grad=True)]
    other = [torch.randn(5, 10), torch.randn(2, 10), torch.randn(5, 2, requires_grad=True)]
    y, _ = spectral_ops.lowrank_linear_group(x, [(*used, None, 0.5), (*other, None, 1.0)])
    y.square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in (x, used[1], used[2])]
    expected = copies[0] @ used[0].t() + 0.5 * (copies[0] @ copies[1].t()) @ copies[2].t()
    expected.square().sum().backward()
    for t, c in zip((x, used[1], used[2]), copies, strict=True):
        torch.testing.assert_close(t.grad, c.grad, rtol=1e-4, atol=1e-4)
    assert other[1].grad is None and other[2].grad is None


@pytest.mark.parametrize("g", [1.0, 0.05, 0.0])
def test_dora_update_keeps_the_magnitudes_gradient_beside_a_large_bias(g):
    torch.manual_seed(0)
    x, W = torch.randn(64, 10).bfloat16(), (torch.randn(8, 10) * 0.3).bfloat16()
    A, B, bias = torch.randn(4, 10) * 0.1, torch.randn(8, 4) * 0.1, torch.full((8,), 30.0, dtype=torch.bfloat16)
    norm = spectral_ops.column_norm(W, A, B)
    m = (g * norm).requires_grad_()
    base_out = torch.nn.functional.linear(x, W, bias)
    z = (base_out - bias).double() + x.double() @ A.double().t() @ B.double().t()
    dy = torch.randn(64, 8).bfloat16()
    spectral_ops.dora_update(base_out, x, A, B, m, norm, bias).backward(dy)
    exact = (dy.double() * z).sum(0) / norm.double()
    assert (m.grad - exact).norm() <= 0.02 * exact.norm()
