"""segments(): rows of one batch under different LoRA adapters of a model, in training and under checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import spectral_ops as so
from spectral_ops import LoRAConfig

NAMES = ["policy", "value"]
IDS = torch.tensor([1, -1, 0, 1])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def build(dropout=0.0, targets=("up", "down"), **more) -> nn.Sequential:
    """Two blocks with adapters of ranks 3 and 2; the second adapter misses every "down"."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(8), Block(8), nn.Linear(8, 5)).double()
    options = {"init_lora_weights": False, "lora_dropout": dropout, **more}
    so.attach(model, LoRAConfig(r=3, lora_alpha=6, target_modules=list(targets), **options), "policy")
    so.attach(model, LoRAConfig(r=2, lora_alpha=1, target_modules=["up"], **options), "value")
    return so.train_adapters(model, NAMES)


@pytest.fixture
def model():
    return build()


@pytest.fixture
def x():
    return torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def apart(model, x, ids=IDS, names=NAMES):
    """Every adapter's rows by themselves, one forward after the other."""
    y = torch.empty(*x.shape[:-1], 5, dtype=x.dtype)
    for s, name in enumerate(["", *names], -1):
        if name:
            so.set_adapter(model, name)
            y = torch.where((ids == s).view(-1, 1, 1), model(x), y)
        else:
            with so.disabled(model):
                y = torch.where((ids == s).view(-1, 1, 1), model(x), y)
    return y


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if "lora" in name}


def train(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: g.clone() for name, g in gradients(model).items()}


def reference(model, x):
    """Outputs and every adapter's gradients, adapter by adapter."""
    want = apart(model, x).detach()
    total = {}
    for s, name in enumerate(NAMES):
        so.set_adapter(model, name)
        model.zero_grad()
        model(x)[s == IDS].square().sum().backward()
        total |= {n: g.clone() for n, g in gradients(model).items() if n.endswith(name)}
    model.zero_grad()
    so.train_adapters(model, NAMES)
    return want, total


def same(got, want):
    assert got.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, msg=lambda m, n=name: f"{n}: {m}")


def test_trains_every_adapter_at_once(model, x):
    want, grads = reference(model, x)
    with so.segments(model, IDS, NAMES):
        y = model(x)
    torch.testing.assert_close(y, want)
    same(train(model, y), grads)


def test_ids_by_token_and_names_by_sequence(model, x):
    want = apart(model, x)
    with so.segments(model, IDS.int().view(4, 1).expand(4, 6), NAMES):
        torch.testing.assert_close(model(x), want)
    with so.segments(model, ["value", "__base__", "policy", "value"]):
        torch.testing.assert_close(model(x), want)
    with so.disabled(model):
        base = model(x)
    with so.segments(model, torch.full((4,), -1), NAMES):
        torch.testing.assert_close(model(x), base)


def test_blocks_nest_and_end_after_an_exception(model, x):
    so.set_adapter(model, "policy")
    plain = model(x)
    with so.segments(model, IDS, NAMES):
        outer = model(x)
        with pytest.raises(KeyError), so.segments(model, torch.zeros(4, dtype=torch.int32), ["value"]):
            assert not torch.equal(model(x), outer)
            raise KeyError
        assert torch.equal(model(x), outer)
        with so.disabled(model):
            base = model(x)
    assert torch.equal(model(x), plain)
    with so.disabled(model):
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["inside", "bound", "transformers"])
def test_checkpointing_reads_the_ids_of_its_own_forward(model, x, way, reentrant):
    x.requires_grad_()  # which reentrant checkpoints need
    with so.segments(model, IDS, NAMES):
        want = train(model, model(x))

    def recomputed(function, hidden):
        return checkpoint(function, hidden, use_reentrant=reentrant)

    for layer in model[:2]:
        layer._gradient_checkpointing_func = recomputed  # as transformers does, and calls
    block, hidden = so.segments(model, IDS, NAMES), x
    with block:
        for layer in model[:2]:
            if way == "transformers":
                hidden = layer._gradient_checkpointing_func(layer.forward, hidden)
            else:
                hidden = recomputed(block.bind(layer) if way == "bound" else layer, hidden)
        y = model[2](hidden)
        if way == "inside":
            same(train(model, y), want)
            return
    with so.segments(model, IDS.flip(0), NAMES), torch.no_grad():  # another forward before the backward
        model(x)
    same(train(model, y), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_after_the_block_raises(model, x, reentrant):
    x.requires_grad_()
    with so.segments(model, IDS, NAMES):
        y = model[2](checkpoint(model[0], x, use_reentrant=reentrant))
    with pytest.raises(RuntimeError, match="after its block has ended"):
        y.sum().backward()
    so.set_adapter(model, "policy")
    checkpoint(model[0], x, use_reentrant=reentrant).sum().backward()  # of a forward outside any block: no error


def test_dropout_is_shared_and_reproducible(x):
    model = build(dropout=0.4)
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        with so.segments(model, IDS, NAMES):
            outputs.append(model(x))
    assert torch.equal(*outputs)
    model.eval()
    with so.segments(model, IDS, NAMES):
        torch.testing.assert_close(model(x), apart(model, x))


def test_over_a_base_that_computes_its_own_product(model, x):
    """Where the operator must not read the weight, it adds to what the base layer returns."""
    want, grads = reference(model, x)
    model[0].up.base_layer.register_forward_hook(lambda *_: None)
    with so.segments(model, IDS, NAMES):
        y = model(x)
    torch.testing.assert_close(y, want)
    same(train(model, y), grads)


def test_only_the_adapters_that_require_gradients(model, x):
    so.set_adapter(model, "value")
    with so.segments(model, IDS, NAMES):
        y = model(x)
    y.sum().backward()
    assert all((g is not None) == name.endswith("value") for name, g in gradients(model).items())


def test_wrong_arguments(model):
    cases = [
        ((IDS, ["policy", "critic"]), ValueError, "adapter_names: got 'critic'"),
        ((IDS, ["policy", "policy"]), ValueError, "wanted each name once"),
        ((IDS, None), TypeError, "adapter_names: got None"),
        ((["policy"], NAMES), ValueError, "wanted None beside"),
        ((IDS.float(), NAMES), TypeError, "segment_ids: got [4] float32"),
        ((IDS + 1, NAMES), ValueError, "segment_ids: got values from 0 to 2"),
        ((["critic"],), ValueError, "adapter_names: got 'critic'"),
    ]
    for args, error, message in cases:
        with pytest.raises(error) as caught:
            so.segments(model, *args)
        assert message in str(caught.value)
    with so.segments(model, IDS, NAMES), pytest.raises(ValueError, match=r"segment_ids: got \[4\]"):
        model(torch.randn(3, 6, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="adapter_names: got 'critic'"):
        so.train_adapters(model, ["critic"])


def test_models_that_cannot(model):
    so.set_adapter(model, "policy")
    so.merge(model)
    with pytest.raises(ValueError, match="merged"):
        so.segments(model, IDS, NAMES)
    for config, message in (
        (so.DoRAConfig(r=2, target_modules=["up"]), "a DoRALinear"),
        (LoRAConfig(r=2, target_modules=["up"], init_lora_weights="pissa"), "changed its base"),
        (LoRAConfig(r=2, target_modules=["up"], modules_to_save=["2"]), "trained whole"),
    ):
        other = nn.Sequential(Block(8), Block(8), nn.Linear(8, 5))
        so.attach(other, config, "policy")
        with pytest.raises(ValueError, match=message):
            so.segments(other, IDS.clamp(max=0), ["policy"])
    rows = nn.Sequential(nn.Embedding(9, 8), Block(8))
    so.attach(rows, LoRAConfig(r=2, target_modules=["up"], trainable_token_indices={"0": [1]}), "rows")
    so.attach(rows, LoRAConfig(r=2, target_modules=["up"]), "policy")
    with pytest.raises(ValueError, match="got '0', whose rows train"):
        so.segments(rows, IDS.clamp(max=0), ["rows"])
    so.segments(rows, IDS.clamp(max=0), ["policy"])
    with pytest.raises(ValueError, match="lora_dropout"):
        unlike = build(dropout=0.1)
        so.attach(unlike, LoRAConfig(r=2, target_modules=["up"], lora_dropout=0.2), "third")
        so.segments(unlike, IDS, ["policy", "third"])


@pytest.mark.slow
def test_compiles_whole(model, x):
    """Without a graph break, and another batch's ids are not baked in."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.flip(0)):
        with so.segments(model, ids, NAMES):
            got, want = compiled(x), model(x)
        torch.testing.assert_close(got, want)
        same(train(model, got), train(model, want))


def test_equals_peft_s_mixed_batch(x):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = nn.Sequential(Block(8), nn.Linear(8, 5))
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config), adapter_name="policy")
    theirs.add_adapter("value", peft.LoraConfig(**config))
    torch.manual_seed(0)
    ours = nn.Sequential(Block(8), nn.Linear(8, 5))
    for name in NAMES:
        so.attach(ours, LoRAConfig(**config), name)
        for path, layer in so.adapter_layers(ours).items():
            other = theirs.base_model.model.get_submodule(path)
            layer.lora_A[name].data.copy_(other.lora_A[name].weight)
            layer.lora_B[name].data.copy_(other.lora_B[name].weight)
    names = ["value", "__base__", "policy", "value"]
    with torch.no_grad(), so.segments(ours, names):
        torch.testing.assert_close(ours(x.float()), theirs.eval()(x.float(), adapter_names=names))
