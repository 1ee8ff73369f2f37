"""PEFT's LoRA and DoRA over an embedding, accelerated: PEFT's numbers, gradients, files and merges, nothing as large as
the table held or made beside A's dense gradient, and PEFT's own forward, with a reason, where it does not fit."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from instruments import allocations, saved_tensors  # noqa: E402
from peft_tiny import errors, llama, perturb, tokens, worst  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensors import storage  # noqa: E402

from spectral_ops import accelerate, report, restore  # noqa: E402

EXACT, BFLOAT16 = 5e-6, 2.0**-8
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
V, d = 30, 12


def table(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, d, **options), nn.Linear(d, 5))


def config(method, **fields):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0"], **METHODS[method], **fields})


def adapted(method, dtype=torch.float32, base=None, *, autocast=True, **fields):
    model = (table() if base is None else base).to(dtype)
    return perturb(peft.get_peft_model(model, config(method, **fields), autocast_adapter_dtype=autocast)).train()


def ids(shape=(3, 7), dtype=torch.int64):
    found = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found.view(-1)[:4] = 3  # several times
    return found


def outcome(model, x):
    model.zero_grad()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), **grads}


def pair(model):
    return model, copy.deepcopy(model)


def fused(model):
    found = accelerate(model, strict=True)
    assert found.counts["PEFT"] == 0, str(found)
    return found


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(method, padding_idx):
    for dtype, exact in ((torch.float32, EXACT), (torch.float64, 1e-12)):
        plain, ours = pair(adapted(method, base=table(padding_idx=padding_idx)).to(dtype))
        found = fused(ours)
        for x in (ids(), ids((4,), torch.int32), ids((1, 1)).t(), ids((2, 6))[:, ::2]):
            assert worst(outcome(plain, x), outcome(ours, x)) < exact
        assert not found.fallbacks() and found.rows[0].calls == 4
        A = ours.base_model.model[0].lora_embedding_A["default"]
        assert A.grad.layout == torch.strided and A.grad.shape == A.shape and A.grad.is_contiguous()
        empty = ours(torch.empty(0, 2, dtype=torch.int64))
        assert empty.shape == (0, 2, 5)


@pytest.mark.parametrize("adapter", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_narrow(method, adapter):
    """At most twice as far from float64 as PEFT is, over a bfloat16 table and under autocast."""
    auto, dtype = adapter == "autocast", torch.float32 if adapter == "autocast" else torch.bfloat16
    plain, ours = pair(adapted(method, dtype, autocast=adapter == "float32"))
    oracle = outcome(copy.deepcopy(ours).double(), ids())
    accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=auto):
        theirs, got = (outcome(m, ids()) for m in (plain, ours))
    assert {n: t.dtype for n, t in theirs.items()} == {n: t.dtype for n, t in got.items()}
    assert not report(ours).fallbacks()
    theirs = errors(oracle, theirs)
    for name, error in errors(oracle, got).items():
        assert error <= 2 * theirs[name] + BFLOAT16, (name, error, theirs[name])


def scaled():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(0)
    return nn.Sequential(gemma.Gemma3TextScaledWordEmbedding(V, d, None, embed_scale=3.5), nn.Linear(d, 5))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_scaled_embedding(method):
    """Gemma multiplies its rows by √d; PEFT multiplies the adapter's alike."""
    plain, ours = pair(adapted(method, base=scaled()).double())
    fused(ours)
    assert worst(outcome(plain, ids()), outcome(ours, ids())) < 1e-12


class Shifted(nn.Embedding):
    def forward(self, x):
        return super().forward(x) + 1


LEFT = {
    "max_norm": (lambda: table(max_norm=1.0), "lora", "max_norm"),
    "scale_grad_by_freq": (lambda: table(scale_grad_by_freq=True), "lora", "scale_grad_by_freq"),
    "sparse": (lambda: table(sparse=True), "lora", "sparse"),
    "a lookup of its own, DoRA": (lambda: nn.Sequential(Shifted(V, d), nn.Linear(d, 5)), "dora", "Shifted"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft_with_a_reason(case):
    build, method, reason = LEFT[case]
    model = adapted(method, base=build())
    found = accelerate(model)
    assert found.rows[0].path == "PEFT" and reason in found.rows[0].reason
    with torch.no_grad():
        model(ids())
    assert reason in found.fallbacks()[0].reason and found.rows[0].peft_calls == 1


def test_a_lookup_of_its_own_and_hooks():
    """LoRA adds to whatever the base returns, and never to what a hook may keep."""
    torch.manual_seed(0)
    plain, ours = pair(adapted("lora", base=nn.Sequential(Shifted(V, d), nn.Linear(d, 5))))
    found, seen = fused(ours), []
    assert worst(outcome(plain, ids()), outcome(ours, ids())) < EXACT
    ours.base_model.model[0].base_layer.register_forward_hook(lambda m, args, y: seen.append((y, y.clone())))
    assert worst(outcome(plain, ids()), outcome(ours, ids())) < EXACT
    assert len(seen) == 1 and torch.equal(*seen[0]) and found.rows[0].calls == 2


def test_a_mixed_batch():
    model = adapted("lora")
    model.add_adapter("other", config("lora"))
    plain, ours = pair(perturb(model).eval())
    found = accelerate(ours)
    layer, theirs = (m.base_model.model[0] for m in (ours, plain))
    names = ["default", "other", "__base__"]
    assert torch.equal(layer(ids(), adapter_names=names), theirs(ids(), adapter_names=names))
    assert found.fallbacks()[0].reason == "a mixed batch (adapter_names)"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_files_restore_and_merge(method, tmp_path):
    plain, ours = pair(adapted(method).eval())
    fused(ours)
    for model, folder in ((plain, "plain"), (ours, "ours")):
        model.save_pretrained(tmp_path / folder)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    loaded = peft.PeftModel.from_pretrained(table(), tmp_path / "ours").eval()
    accelerate(loaded, strict=True)
    with torch.no_grad():
        before = ours(ids())
        assert worst({"y": plain(ids())}, {"y": loaded(ids())}) < EXACT
        for model in (plain, ours):
            model.merge_adapter()
        assert torch.equal(plain(ids()), ours(ids()))
        for model in (plain, ours):
            model.unmerge_adapter()
        assert worst({"y": before}, {"y": ours(ids())}) < 1e-4
        with plain.disable_adapter(), ours.disable_adapter():
            assert torch.equal(plain(ids()), ours(ids()))
        restore(ours)
        assert [type(m) for m in plain.modules()] == [type(m) for m in ours.modules()]
        merged = [model.merge_and_unload()(ids()) for model in (plain, ours)]
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
        assert worst(outcome(plain, ids()), outcome(ours, ids())) < EXACT, active
    reasons = {f.reason for f in report(ours).fallbacks()}
    assert reasons == (set() if method == "lora" else {"DoRA beside another adapter over one embedding"})


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
            loss = (torch.utils.checkpoint.checkpoint(model, ids(), use_reentrant=False) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5) and losses[0][-1] < losses[0][0]
    for model in (plain, ours):
        for p in [p for p in model.parameters() if p.requires_grad][::2]:
            p.requires_grad_(False)
    assert worst(outcome(plain, ids()), outcome(ours, ids())) < 2e-5


@pytest.mark.filterwarnings("ignore:Model.*tied")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_language_model_with_tied_embeddings(method):
    """The head that shares E keeps it; the embedding's hook that checkpointing sets is on PEFT's layer."""
    torch.manual_seed(1)
    base = llama()
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    model = peft.get_peft_model(base, config(method, target_modules=["embed_tokens", "q_proj"]))
    plain, ours = pair(perturb(model).train())
    assert ours.base_model.model.lm_head.weight is ours.base_model.model.model.embed_tokens.base_layer.weight
    fused(ours)
    for model in (plain, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (plain, ours)]
    assert worst(*grads) < 2e-5 and any("embed_tokens" in name for name in grads[0])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled(method):
    plain, ours = pair(adapted(method))
    fused(ours)
    layer, theirs = (m.base_model.model[0] for m in (ours, plain))
    torch._dynamo.reset()
    got, want = outcome(torch.compile(layer, backend="aot_eager", fullgraph=True), ids()), outcome(theirs, ids())
    assert worst(want, {n.removeprefix("_orig_mod."): t for n, t in got.items()}) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_nothing_of_the_table_s_size_is_held_or_made(method, dtype):
    """Few ids of many: [V, r] is made once, as A's gradient, and [V, d] never."""
    T, V, d, r = 8, 4096, 16, 2
    model = nn.Sequential(nn.Embedding(V, d))
    model = adapted(method, dtype, model, autocast=False, r=r)
    fused(model)
    x = torch.randint(V, (T,))

    def step():
        model.zero_grad()
        model(x).square().sum().backward()

    step()
    with saved_tensors() as kept:
        model(x)
    known = {storage(t) for t in (x, *model.parameters())}
    held = {storage(t): t.untyped_storage().nbytes() for t in kept if storage(t) not in known}
    assert sum(held.values()) <= 4 * 2 * d + 4 * T * d, held  # gains, and what square saves
    large = [size for size in allocations(step) if size >= V * r * dtype.itemsize]
    assert large == [V * r * dtype.itemsize], large
