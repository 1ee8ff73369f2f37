"""PEFT's LoRA and DoRA over convolutions, accelerated: PEFT's numbers, gradients, files and merges, in either memory
format, nothing of the output's size held beside it, and PEFT's own forward, with a reason, where it does not fit."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from instruments import allocations, saved_tensors  # noqa: E402
from peft_tiny import errors, perturb, worst  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensors import storage  # noqa: E402

from spectral_ops import accelerate, report, restore  # noqa: E402

EXACT, BFLOAT16 = 5e-6, 2.0**-8
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
TARGETS = ["0", "2", "3", "5"]


class Net(nn.Sequential):
    """3×3, stride, 1×1 and a strided 1×1 without a bias."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.Conv2d(16, 10, 1),
            nn.SiLU(), nn.Conv2d(10, 6, 1, stride=2, bias=False),
        )  # fmt: skip


def config(method="lora", targets=TARGETS, **fields):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **METHODS[method], **fields})


def adapted(method, dtype=torch.float32, base=Net, *, autocast=True, **fields):
    model = base().to(dtype)
    return perturb(peft.get_peft_model(model, config(method, **fields), autocast_adapter_dtype=autocast)).train()


def image(dtype=torch.float32, last=False):
    x = torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def outcome(model, x):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


def pair(model):
    return model, copy.deepcopy(model)


def fused(model, n=4):
    found = accelerate(model, strict=True)
    assert found.counts["PEFT"] == 0 and sum(found.counts.values()) == n, str(found)
    return found


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(method, last):
    for dtype, exact in ((torch.float32, EXACT), (torch.float64, 1e-12)):
        plain, ours = pair(adapted(method).to(dtype))
        if last:  # ours alone: with such kernels PEFT's DoRA raises, as it views them as matrices
            ours = ours.to(memory_format=torch.channels_last)
        found, x = fused(ours), image(dtype, last)
        assert worst(outcome(plain, x), outcome(ours, x)) < exact
        assert not found.fallbacks() and all(row.calls == 1 for row in found.rows), str(found)
        assert ours(x).is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        with torch.no_grad():
            assert worst({"y": plain(x)}, {"y": ours(x)}) < exact


@pytest.mark.parametrize("adapter", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_narrow(method, adapter):
    """At most twice as far from float64 as PEFT is, over bfloat16 weights and under autocast."""
    auto, dtype = adapter == "autocast", torch.float32 if adapter == "autocast" else torch.bfloat16
    plain, ours = pair(adapted(method, dtype, autocast=adapter == "float32"))
    oracle = outcome(copy.deepcopy(ours).double(), image().to(dtype).double())
    accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=auto):
        theirs, got = (outcome(m, image(dtype)) for m in (plain, ours))
    assert {n: t.dtype for n, t in theirs.items()} == {n: t.dtype for n, t in got.items()}
    assert not report(ours).fallbacks(), str(report(ours))
    theirs = errors(oracle, theirs)
    for name, error in errors(oracle, got).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


KINDS = {
    "groups": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 5), "lora"),
    "depthwise, one sample": (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 6, 5), "lora"),
    "same, dilated": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 6, 5), "lora"),
    "valid": (nn.Conv2d(4, 6, (3, 1), padding="valid"), (2, 4, 6, 5), "dora"),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 5), "lora"),
    "1d": (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 7), "dora"),
    "1d, one place": (nn.Conv1d(4, 6, 1), (1, 4, 7), "lora"),
    "3d": (nn.Conv3d(3, 6, 2, stride=(1, 2, 1)), (2, 3, 4, 4, 3), "dora"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    base, shape, method = KINDS[kind]
    plain, ours = pair(adapted(method, base=lambda: nn.Sequential(copy.deepcopy(base)), targets=["0"]).double())
    found, x = fused(ours, 1), torch.randn(shape, dtype=torch.float64)
    assert worst(outcome(plain, x), outcome(ours, x)) < 1e-12
    assert found.rows[0].calls == 1 and not found.fallbacks()


LEFT = {
    "a dilated DoRA": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), {"use_dora": True}, "dilation"),
    "padding of one side": (nn.Conv2d(4, 6, 2, padding="same"), {}, "one side"),
    "DoRA, padding mode": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), {"use_dora": True}, "padding mode"),
    "DoRA, dropout": (nn.Conv2d(4, 6, 3), {"use_dora": True, "lora_dropout": 0.5}, "dropout"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft_with_a_reason(case):
    base, fields, reason = LEFT[case]
    plain, ours = pair(adapted("lora", base=lambda: nn.Sequential(copy.deepcopy(base)), targets=["0"], **fields))
    found = accelerate(ours)
    assert found.rows[0].path == "PEFT" and reason in found.rows[0].reason
    x, results = torch.randn(2, 4, 6, 5), []
    for model in (plain, ours):
        torch.manual_seed(5)
        results.append(outcome(model, x))
    assert worst(*results) == 0 and reason in found.fallbacks()[0].reason


def test_hooks_on_the_base_are_seen_between_calls():
    plain, ours = pair(adapted("lora"))
    found, seen = accelerate(ours), []
    ours(image())
    hook = ours.base_model.model[0].base_layer.register_forward_hook(lambda m, args, y: seen.append(y.sum()))
    assert worst(outcome(plain, image()), outcome(ours, image())) < EXACT
    assert len(seen) == 1 and "hooks" in found.fallbacks()[0].reason
    hook.remove()
    ours(image())
    assert found.rows[0].calls == 2


def test_lora_bias_and_dropout():
    plain, ours = pair(adapted("lora", lora_bias=True, targets=["0", "2", "3"], lora_dropout=0.0))
    fused(ours, 3)
    assert worst(outcome(plain, image()), outcome(ours, image())) < EXACT
    model = adapted("lora", lora_dropout=0.5)
    fused(model)
    x = image().double()
    model.double()
    torch.manual_seed(0)
    first = outcome(model, x)
    torch.manual_seed(0)
    assert worst(first, outcome(model, x)) == 0 and not torch.equal(first["y"], model(x).detach())
    layer, n = model.base_model.model[2], 400  # the mean over masks is the layer without dropout
    h = torch.randn(1, 12, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        mean = sum(layer(h) for _ in range(n)) / n
        model.eval()
        torch.testing.assert_close(mean, layer(h), rtol=0, atol=6 * layer(h).std().item() / n**0.5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_files_restore_and_merge(method, tmp_path):
    plain, ours = pair(adapted(method).eval())
    fused(ours)
    for model, folder in ((plain, "plain"), (ours, "ours")):
        model.save_pretrained(tmp_path / folder)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    accelerate(loaded, strict=True)
    x = image()
    with torch.no_grad():
        before = ours(x)
        assert worst({"y": plain(x)}, {"y": loaded(x)}) < EXACT
        for model in (plain, ours):
            model.merge_adapter()
        assert torch.equal(plain(x), ours(x))
        for model in (plain, ours):
            model.unmerge_adapter()
        assert worst({"y": before}, {"y": ours(x)}) < 1e-4
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(plain(x), ours(x))
        restore(ours)
        assert [type(m) for m in plain.modules()] == [type(m) for m in ours.modules()]
        merged = [model.merge_and_unload()(x) for model in (plain, ours)]
    assert torch.equal(*merged)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_second_adapter(method):
    model = adapted(method)
    model.add_adapter("other", config(method, r=2))
    plain, ours = pair(perturb(model))
    accelerate(ours)
    for active in ("other", ["default", "other"], "default"):
        for m in (plain, ours):
            m.base_model.set_adapter(active)
        assert worst(outcome(plain, image()), outcome(ours, image())) < EXACT, active
    reasons = {f.reason for f in report(ours).fallbacks()}
    assert reasons == (set() if method == "lora" else {"DoRA beside another adapter over one convolution"})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_frozen_parameters_and_checkpointing(method):
    plain, ours = pair(adapted(method))
    fused(ours)
    losses = []
    for model in (plain, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        losses.append([])
        for _ in range(4):  # DoRA's norm is computed anew after every step
            optimizer.zero_grad()
            loss = (torch.utils.checkpoint.checkpoint(model, image(), use_reentrant=False) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5) and losses[0][-1] < losses[0][0]
    for model in (plain, ours):
        for p in [p for p in model.parameters() if p.requires_grad][::2]:
            p.requires_grad_(False)
    assert worst(outcome(plain, image()), outcome(ours, image())) < 2e-5


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_trained_bias(method):
    """LoraConfig(bias="all") trains the base layer's too."""
    plain, ours = pair(adapted(method, bias="all"))
    fused(ours)
    got = outcome(ours, image())
    assert worst(outcome(plain, image()), got) < EXACT and any(name.endswith("base_layer.bias") for name in got)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled(method):
    plain, ours = pair(adapted(method, targets=["0", "3"]))
    fused(ours, 2)
    for i, x in ((0, image()), (3, torch.randn(2, 16, 4, 3))):
        layer, theirs = (m.base_model.model[i] for m in (ours, plain))
        torch._dynamo.reset()
        got, want = outcome(torch.compile(layer, backend="aot_eager", fullgraph=True), x), outcome(theirs, x)
        assert worst(want, {n.removeprefix("_orig_mod."): t for n, t in got.items()}) < 2e-5


def layer_of(method, kernel, last):
    base = nn.Conv2d(24, 32, kernel, padding=kernel // 2).requires_grad_(False)
    model = perturb(peft.get_peft_model(nn.Sequential(base), config(method, ["0"], r=2)))
    x = torch.randn(1, 24, 16, 16)
    x = x.to(memory_format=torch.channels_last) if last else x
    fused(model, 1)
    return model, x.requires_grad_()


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_nothing_of_the_output_s_size_is_held_or_made(method, kernel, last):
    """Beside x only h, small vectors and, for DoRA, the output itself; forward makes that output, once."""
    model, x = layer_of(method, kernel, last)
    model(x).sum().backward()
    with saved_tensors() as kept:
        y = model(x)
    known = {storage(t) for t in (x, *model.parameters())}
    held = {storage(t): t.untyped_storage().nbytes() for t in kept if storage(t) not in known}
    held.pop(storage(y), None)
    assert sum(held.values()) <= 4 * 2 * 256 + 1024, held
    made = allocations(lambda: model(x))
    workspace = 2 if kernel == 3 else 0  # the library's convolution lays out its input and its result
    assert sum(size >= y.nbytes for size in made) <= 1 + workspace + (kernel == 1 and not last), made
    theirs = restore(model)
    assert sum(size >= y.nbytes for size in made) < sum(size >= y.nbytes for size in allocations(lambda: theirs(x)))


def test_an_output_that_is_overwritten():
    """DoRA's backward reads its output; with recompute it does not."""
    model, x = layer_of("dora", 3, False)
    with pytest.raises(RuntimeError, match="overwritten in place before its backward.*recompute=True"):
        nn.functional.relu_(model(x)).sum().backward()
    accelerate(model, recompute=True)
    nn.functional.relu_(model(x)).sum().backward()


def test_a_magnitude_that_vanishes():
    """There y says nothing of z: its gradient comes from the convolution."""
    model = adapted("dora").double()
    with torch.no_grad():
        for layer in (model.base_model.model[i] for i in (0, 2)):
            layer.lora_magnitude_vector["default"].weight[:, ::3] = 0
    plain, ours = pair(model)
    fused(ours)
    assert worst(outcome(plain, image(torch.float64)), outcome(ours, image(torch.float64))) < 1e-12
