"""4-bit and 8-bit bases: bitsandbytes computes x Wᵀ, the fused operators add the adapter to its result in place."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

import peft  # noqa: E402
from peft import AdaLoraConfig, LoraConfig, MissConfig, get_peft_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft_tiny import errors, pair, perturb, worst  # noqa: E402

from spectral_ops import accelerate  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = {AdaLoraConfig: "init_r"}  # "r" elsewhere
ADALORA = {"kind": AdaLoraConfig, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": 10}


class Net(nn.Module):
    def __init__(self, bits: int, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        for name in ("first", "second"):
            linear = nn.Linear(64, 64)
            if bits == 4:
                layer = bnb.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            layer.load_state_dict(linear.state_dict())
            setattr(self, name, layer.to("cpu"))  # this quantises
        setattr(self, f"is_loaded_in_{bits}bit", True)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def quantised(bits, dtype, kind=LoraConfig, **settings):
    torch.manual_seed(1)
    try:
        model = get_peft_model(
            Net(bits, dtype), kind(**{RANK.get(kind, "r"): 5, **settings}, target_modules=["first", "second"])
        )
        model(torch.randn(2, 64, dtype=dtype, requires_grad=True)).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this bitsandbytes {bnb.__version__} does not run its {bits}-bit layer on the CPU: {error}")
    return perturb(model)


def results(model, dtype):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def fresh(bits, dtype, **settings):
    """Two equal models; an 8-bit layer cannot be copied, nor in PEFT with DoRA be called twice on the CPU."""
    quantised(bits, dtype, **settings)
    torch.manual_seed(1)
    kind = settings.pop("kind", LoraConfig)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        adapter = kind(**{RANK.get(kind, "r"): 5, **settings}, target_modules=["first", "second"])
        models.append(perturb(get_peft_model(Net(bits, dtype), adapter)))
    return models


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"kind": MissConfig},
        {"kind": MissConfig, "init_weights": False},
        ADALORA,
    ],
    ids=["lora", "dora", "lora_bias", "miss", "miss_random", "adalora"],
)
def test_same_as_peft(bits, dtype, settings):
    plain, ours = fresh(bits, dtype, **settings)
    report = accelerate(ours, strict=True)
    assert report.counts == {"fused": 0, "fused (base-agnostic)": 2, "PEFT": 0}
    expected, got = results(plain, dtype), results(ours, dtype)
    if dtype == torch.float32:
        assert worst(expected, got) < 5e-6
    else:  # a handful of roundings in each of two layers, at places of their own
        assert max(errors(expected, got).values()) < 4 * 2.0**-8
    assert worst(got, results(ours, dtype)) == 0.0  # again, the same
    assert not report.fallbacks()


@pytest.mark.parametrize("bits", [4, 8])
def test_dropout(bits):
    plain, ours = fresh(bits, torch.float32, lora_dropout=0.4)
    report = accelerate(ours, strict=True)
    torch.manual_seed(3)
    first = results(ours, torch.float32)
    torch.manual_seed(3)
    assert worst(first, results(ours, torch.float32)) == 0.0
    assert worst(first, results(ours, torch.float32)) > 1e-3
    for model in (plain, ours):
        model.eval()
    assert worst(results(plain, torch.float32), results(ours, torch.float32)) < 5e-6
    assert not report.fallbacks()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_adapters_over_float32_x(bits, dora):
    """A base computed in bfloat16 inside a float32 model: PEFT casts x to the adapter's dtype, and the product back."""
    models = []
    for model in fresh(bits, torch.bfloat16, use_dora=dora, lora_alpha=3):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.bfloat16()
        models.append(model)
    plain, ours = models
    report = accelerate(ours, strict=True)
    expected, got = results(plain, torch.float32), results(ours, torch.float32)
    assert {n: g.dtype for n, g in got.items()} == {n: g.dtype for n, g in expected.items()}
    assert max(errors(expected, got).values()) < 4 * 2.0**-8
    assert not report.fallbacks()


@pytest.mark.parametrize("bits", [4, 8])
def test_several_dora_and_a_tensor_as_the_scaling(bits):
    models = []
    for model in fresh(bits, torch.float32, use_dora=True):
        torch.manual_seed(4)
        model.add_adapter("other", LoraConfig(r=3, use_dora=True, target_modules=["first", "second"]))
        model.add_adapter("third", LoraConfig(r=2, target_modules=["first", "second"]))
        model.base_model.set_adapter(["default", "third", "other"])
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.scaling["other"] = torch.tensor(0.7)
        models.append(perturb(model))
    plain, ours = models
    report = accelerate(ours, strict=True)
    assert {row.operators for row in report.rows} == {"column_norm, dora_update, lowrank_update"}
    assert worst(results(plain, torch.float32), results(ours, torch.float32)) < 5e-6
    assert not report.fallbacks()


def allocated(model):
    """Losses of a run that prunes, and which triplets every choice of it kept."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    generator, losses, patterns = torch.Generator().manual_seed(4), [], []
    for step in range(1, 11):
        x, target = torch.randn(6, 64, generator=generator), torch.randn(6, 64, generator=generator)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        pattern = model.peft_config["default"].rank_pattern
        patterns.append(None if pattern is None else dict(pattern.items()))
    return losses, patterns


@pytest.mark.parametrize("bits", [4, 8])
def test_adalora_allocates_as_peft_does(bits):
    plain, ours = fresh(bits, torch.float32, **ADALORA)
    report = accelerate(ours, strict=True)
    assert {row.operators for row in report.rows} == {"lowrank_update"}
    assert "update_and_allocate and regulariser: fused" in str(report)
    (losses, patterns), (got, chosen) = allocated(plain), allocated(ours)
    assert got == pytest.approx(losses, rel=1e-4) and chosen == patterns
    assert patterns[-1] is not None and sum(sum(kept) for kept in patterns[-1].values()) == 2 * 2
    assert not report.fallbacks()


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_with_dropout(bits):
    """PEFT multiplies the dropped x by the dequantised weight. Torch draws the masks of both."""
    plain, ours = fresh(bits, torch.float32, use_dora=True, lora_dropout=0.4)
    report, got = accelerate(ours, strict=True), []
    for model in (plain, ours):
        torch.manual_seed(3)
        got.append(results(model, torch.float32))
    assert worst(*got) < 5e-6
    assert worst(got[1], results(ours, torch.float32)) > 1e-3
    assert not report.fallbacks()


@pytest.mark.parametrize("bits", [4, 8])
def test_bat_falls_back(bits):
    if bits == 4 and not hasattr(BaseTunerLayer, "get_base_weight"):
        pytest.skip(f"PEFT {peft.__version__} takes the packed 4-bit weight for a matrix, and fails")
    plain, ours = fresh(bits, torch.float32, kind=MissConfig, init_weights="bat", r=16)
    report = accelerate(ours)
    reason = "bat transforms the weight itself, and the base layer holds it quantised"
    assert {(row.path, row.reason) for row in report.rows} == {("PEFT", reason)}
    assert worst(results(plain, torch.float32), results(ours, torch.float32)) == 0.0


def test_autocast_keeps_no_float32_copy_of_x():
    model = quantised(4, torch.bfloat16)
    accelerate(model, strict=True)
    shapes = []

    def pack(t):
        if t.dtype == torch.float32 and t.dim() == 2 and t.shape[0] == 6:
            shapes.append(t.shape)
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert not shapes


def test_4bit_deepcopy_merge_and_disable():
    plain, ours = pair(quantised(4, torch.float32))
    report = accelerate(ours, strict=True)
    with plain.disable_adapter(), ours.disable_adapter():
        assert worst(results(plain, torch.float32), results(ours, torch.float32)) == 0.0
    duplicate = pair(ours)[1]
    assert worst(results(duplicate, torch.float32), results(ours, torch.float32)) == 0.0
    for model in (plain, ours):
        model.merge_adapter()
    x = torch.randn(3, 64)
    assert torch.equal(plain(x), ours(x))
    assert not report.fallbacks()
