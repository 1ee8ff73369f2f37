"""Spectral initialisations: what the factors are, what they leave of the base, and PEFT's PiSSA beside ours."""

import time

import pytest
import torch
from torch import nn

from spectral_ops import LoRAConfig, LoRALinear
from spectral_ops.init import SpectralInit, clear_svd_cache, spectral_factors, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(init, d=24, k=40, r=5, dtype=torch.float32, **options):
    linear = nn.Linear(k, d).to(dtype)
    weight = linear.weight.detach().clone()
    return weight, LoRALinear.from_linear(linear, LoRAConfig(r=r, init_lora_weights=init, **options))


def product(adapted: LoRALinear) -> torch.Tensor:
    A, B = adapted.lora_A["default"].double(), adapted.lora_B["default"].double()
    return adapted.settings["default"].scaling * (B @ A)


SPECTRAL = ["pissa", "pissa_niter_2", "milora", "milora_min", "milora_mid", "milora_max", "milora_random"]


@pytest.mark.parametrize("init", SPECTRAL)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_base_and_product_are_the_weight(init, use_rslora):
    weight, adapted = layer(init, lora_alpha=12, use_rslora=use_rslora)
    whole = adapted.base_layer.weight.double() + product(adapted)
    assert torch.allclose(whole, weight.double(), atol=2e-7)
    assert not torch.allclose(adapted.base_layer.weight, weight, atol=1e-4)
    assert torch.allclose(adapted.original_weight(), weight, atol=2e-7)


@pytest.mark.parametrize(
    ("init", "start"), [("pissa", 0), ("milora_max", 0), ("milora_mid", 9), ("milora", 19), ("milora_min", 19)]
)
def test_the_triplets_are_those_of_the_mode(init, start):
    weight, adapted = layer(init)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(start, start + 5)
    assert torch.allclose(product(adapted), U[:, part] * S[part] @ Vh[part], atol=1e-6)
    # each factor carries the root of S / γ
    gamma = adapted.settings["default"].scaling
    assert torch.allclose(adapted.lora_A["default"].double().norm(dim=1) ** 2, S[part] / gamma, atol=1e-6)
    assert torch.allclose(adapted.lora_B["default"].double().norm(dim=0) ** 2, S[part] / gamma, atol=1e-6)


def test_random_triplets_follow_torchs_generator():
    weight = torch.randn(20, 30)
    torch.manual_seed(3)
    first = truncated_svd(weight, 4, mode="random")
    second = truncated_svd(weight, 4, mode="random")
    torch.manual_seed(3)
    again = truncated_svd(weight, 4, mode="random")
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], second[1])
    every = torch.linalg.svdvals(weight)
    assert all((every - s).abs().min() < 1e-5 for s in first[1])


@pytest.mark.parametrize("init", ["pissa_niter_1", "milora_random", True, "gaussian"])
def test_a_seed_reproduces_an_initialisation(init):
    torch.manual_seed(11)
    weight, first = layer(init)
    torch.manual_seed(11)
    _, second = layer(init)
    _, third = layer(init)
    assert torch.equal(first.lora_A["default"], second.lora_A["default"])
    assert torch.equal(first.lora_B["default"], second.lora_B["default"])
    assert not torch.equal(first.lora_A["default"], third.lora_A["default"])


def decaying(n: int) -> torch.Tensor:
    """A weight whose singular values fall like those of a trained layer."""
    U, V = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    return U * torch.arange(1, n + 1).float().pow(-0.6) @ V


def test_randomized_is_close_and_much_faster_on_a_large_weight():
    weight, r = decaying(1024), 16
    truncated_svd(weight[:64], 4, niter=1)  # warm
    start = time.perf_counter()
    A, B = spectral_factors(weight, r, 2.0, SpectralInit("max"))
    exact_time = time.perf_counter() - start
    times = []
    for _ in range(3):
        clear_svd_cache()
        start = time.perf_counter()
        a, b = spectral_factors(weight, r, 2.0, SpectralInit("max", niter=4))
        times.append(time.perf_counter() - start)
    best = (weight - 2 * B @ A).norm()
    found = (weight - 2 * b @ a).norm()
    assert best <= found * (1 + 1e-5) and found <= 1.001 * best
    assert min(times) < exact_time / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_is_subtracted_from_in_float32_and_cast_once(dtype):
    weight, adapted = layer("pissa", dtype=dtype)
    assert adapted.lora_A["default"].dtype == torch.float32
    expected = (weight.double() - product(adapted)).to(dtype)
    assert adapted.base_layer.weight.dtype == dtype
    # equal but for values that a float32 rounding moves across a rounding boundary of the base's dtype
    assert (adapted.base_layer.weight != expected).float().mean() < 0.01
    assert torch.allclose(adapted.base_layer.weight.double(), expected.double(), rtol=torch.finfo(dtype).eps)


def test_float64_stays_float64():
    weight, adapted = layer("pissa", dtype=torch.float64)
    assert adapted.lora_A["default"].dtype == torch.float64
    assert torch.allclose(adapted.base_layer.weight + product(adapted), weight, atol=1e-15)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_spans_what_pefts_does(use_rslora):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(40, 24))
    weight, bias = (p.detach().clone() for p in model[0].parameters())
    settings = {"r": 5, "lora_alpha": 3, "use_rslora": use_rslora, "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **settings)).base_model.model[0]
    linear = nn.Linear(40, 24)
    linear.load_state_dict({"weight": weight, "bias": bias})
    ours = LoRALinear.from_linear(linear, LoRAConfig(**settings))
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-6)
    assert torch.allclose(product(ours).float(), theirs.get_delta_weight("default"), atol=1e-6)
    overlap = ours.lora_A["default"] @ theirs.lora_A["default"].weight.T  # equal up to signs
    norms = ours.lora_A["default"].norm(dim=1) * theirs.lora_A["default"].weight.norm(dim=1)
    assert torch.allclose(overlap.diagonal().abs(), norms, rtol=1e-4)


def test_lora_initialisations():
    _, kaiming = layer(True, k=400)
    A, B = kaiming.lora_A["default"], kaiming.lora_B["default"]
    assert A.abs().max() <= (1 / 400) ** 0.5 and A.abs().max() > 0.9 * (1 / 400) ** 0.5 and not B.any()
    _, gaussian = layer("gaussian", k=4000)
    assert abs(gaussian.lora_A["default"].std().item() - 1 / 5) < 0.01 and not gaussian.lora_B["default"].any()
    _, both = layer(False)
    assert both.lora_A["default"].any() and both.lora_B["default"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r: got 0, wanted at least 1"),
        ({"r": 21}, "at most 20"),
        ({"r": 2, "mode": "top"}, "mode: got 'top'"),
        ({"r": 2, "niter": -1}, "niter: got -1"),
        ({"r": 2, "mode": "min", "niter": 2}, "niter: got 2 with mode 'min'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(torch.randn(20, 30), **arguments)


def test_bad_factors():
    with pytest.raises(ValueError, match="scale: got 0.0"):
        spectral_factors(torch.randn(4, 4), 2, 0.0, SpectralInit("max"))
    with pytest.raises(ValueError, match=r"LoRAConfig.r: got 30, wanted at most 24 \(a weight \[24, 40\]"):
        layer("pissa", r=30)
    for name in ("pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "milora_best", "svd", 3, None):
        assert SpectralInit.parse(name) is None
