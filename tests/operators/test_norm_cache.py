"""NormCache: DoRA's column norm is reused within one optimizer step, and never beyond (METHODS 1.2, trap 2)."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from instruments import Recorder, saved_tensors
from oracles import sampled_columns, sampled_entries, weight_norm
from tensors import randn, storage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import spectral_ops
from spectral_ops import NormCache, explain

d, k, r, SCALE = 24, 16, 3, 0.5


@pytest.fixture
def layer():
    W = randn(d, k, dtype=torch.float32, fan=k)
    A = torch.nn.Parameter(randn(r, k, dtype=torch.float32, fan=k))
    B = torch.nn.Parameter(randn(d, r, dtype=torch.float32))
    return W, A, B


def agrees(norm, W, A, B, scale=SCALE) -> bool:
    return torch.allclose(norm.double(), weight_norm(W, A.detach(), B.detach(), scale), rtol=1e-5, atol=0)


def test_it_is_the_column_norm(layer, backend):
    cache = NormCache()
    for _ in range(3):
        got = cache.get(*layer, SCALE)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        assert agrees(got, *layer)


def test_reused_within_a_step(layer):
    """A buffer spoiled behind its back shows whether the second call computed anything."""
    if explain("column_norm_cached_", layer[0]).backend == "reference":
        pytest.skip("the reference always recomputes")
    cache = NormCache()
    cache.get(*layer, SCALE).fill_(7)
    assert (cache.get(*layer, SCALE) == 7).all(), "computed again although neither A nor B changed"
    cache.invalidate()
    assert agrees(cache.get(*layer, SCALE), *layer)


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.mul_(1.5),
        lambda p: p.data.view(-1)[-1].add_(1.0),  # one number in one corner
        lambda p: p.data.view(-1)[0].add_(2.0**-10),
        lambda p: p.data.neg_(),
        lambda p: p.data.copy_(p.data.flip(0)),  # the same numbers in another order
        lambda p: p.detach().mul_(2),
        lambda p: p.data.zero_(),
        lambda p: torch._foreach_mul_([p.data], 3.0),
        lambda p: p.data.untyped_storage().copy_((p.data * 2).untyped_storage()),
        lambda p: torch.from_numpy(p.data.numpy()).mul_(2),  # a write that torch never sees
    ],
    ids=["scale", "last", "first", "sign", "order", "detach", "zero", "foreach", "storage", "numpy"],
)
def test_writes_within_a_step_are_noticed(layer, write, name, backend):
    W, A, B = layer
    cache = NormCache()
    cache.get(W, A, B, SCALE)
    before = cache.get(W, A, B, SCALE).clone()
    with torch.no_grad():
        write({"A": A, "B": B}[name])
    got = cache.get(W, A, B, SCALE)
    assert agrees(got, W, A, B)
    if name == "B" or not torch.equal(weight_norm(W, A.detach(), B.detach(), SCALE).float(), before):
        assert not torch.equal(got, before)


def test_swapped_values_are_noticed(layer, backend):
    """Two writes that cancel in a plain sum, and A and B trading a change: a fingerprint must not add them away."""
    W, A, B = layer
    cache = NormCache()
    cache.get(W, A, B, SCALE)
    A.data[0, 0] += 1
    A.data[1, 3] -= 1
    assert agrees(cache.get(W, A, B, SCALE), W, A, B)
    A.data[0, 0] += 0.5
    B.data[0, 0] -= 0.5
    assert agrees(cache.get(W, A, B, SCALE), W, A, B)
    first = A.data[0].clone()
    A.data[0] = A.data[1]
    A.data[1] = first
    assert agrees(cache.get(W, A, B, SCALE), W, A, B)


def test_many_small_writes_are_noticed(layer, backend):
    W, A, B = layer
    cache = NormCache()
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        p = (A, B)[step % 2].data.view(-1)
        i = int(torch.randint(p.numel(), (1,), generator=generator))
        p[i] += float(torch.randn((), generator=generator))
        assert agrees(cache.get(W, A, B, SCALE), W, A, B), f"stale after write {step}"


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
def test_reuse_ends_at_an_optimizer_step(layer, options, backend):
    W, A, B = layer
    cache = NormCache()
    optimizer = torch.optim.AdamW([A, B], lr=0.1, **options)
    for _ in range(3):
        norm = cache.get(W, A, B, SCALE)
        (A.sum() + B.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        norm.fill_(7)  # not even an unnoticed change may let this through
        assert agrees(cache.get(W, A, B, SCALE), W, A, B)


def test_any_optimizers_step_ends_reuse(layer):
    """Even one that holds other parameters, or none of whose gradients is set: the hook counts steps, not changes."""
    cache = NormCache()
    cache.get(*layer, SCALE).fill_(7)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0).step()
    assert agrees(cache.get(*layer, SCALE), *layer)


def test_training_with_the_cache_is_training_without(layer):
    """20 fused AdamW steps of two micro-batches each, on the same data."""
    runs = []
    for cached in (True, False):
        torch.manual_seed(5)
        W, A, B = (p.detach().clone() for p in layer)
        A, B = torch.nn.Parameter(A), torch.nn.Parameter(B)
        m = torch.nn.Parameter(weight_norm(W, A.detach(), B.detach(), SCALE).float())
        optimizer = torch.optim.AdamW([A, B, m], lr=0.05, fused=True)
        cache = NormCache()
        for _ in range(20):
            for _ in range(2):
                x = torch.randn(5, k)
                norm = cache.get(W, A, B, SCALE) if cached else None
                spectral_ops.dora_linear(x, W, A, B, m, scale=SCALE, norm=norm).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in (A, B, m)])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_another_weight_scale_or_parameter_is_not_reused(layer, backend):
    W, A, B = layer
    cache = NormCache()
    cache.get(W, A, B, SCALE)
    assert agrees(cache.get(W, A, B, 2.0), W, A, B, 2.0)
    other = W * 2
    assert agrees(cache.get(other, A, B, SCALE), other, A, B)
    assert agrees(cache.get(W, A * 2, B, SCALE), W, A * 2, B)
    assert agrees(cache.get(W, A[:1], B[:, :1], SCALE), W, A[:1], B[:, :1])
    assert cache.get(W.double(), A.double(), B.double(), SCALE).dtype == torch.float64
    assert agrees(cache.get(W.bfloat16(), A, B, SCALE), W.bfloat16(), A, B)
    smaller = W[: d // 2].clone()
    assert agrees(cache.get(smaller, A, B[: d // 2], SCALE), smaller, A, B[: d // 2])


@pytest.mark.parametrize("size", [(d, k), (600, 500)], ids=["whole", "sampled"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_changed_weight(size, transposed, dtype, backend):
    """In place: noticed by its version. Through ``.data``: by the fingerprint, which samples a large W."""
    rows, columns = size
    W = randn(columns, rows, dtype=dtype).t() if transposed else randn(rows, columns, dtype=dtype)
    A, B = randn(r, columns, fan=columns), randn(rows, r)
    cache = NormCache()
    for write in (
        lambda W: W.mul_(2),
        lambda W: W.data.mul_(2),
        lambda W: W.data.add_(SCALE * (B @ A).to(dtype)),  # a merge
        lambda W: W.data.add_(0.01 * torch.randn(W.shape).to(dtype)),
        lambda W: W.data.copy_(W.data.flip(0)),
        lambda W: W.data[rows // 3].mul_(3),
        lambda W: W.data[:, columns // 3].add_(2),
        lambda W: W.data[rows // 2 : rows // 2 + 16, 3:19].add_(1),  # a square of side 2 √s: s is 64 here
        lambda W: W.data[5, -64:].neg_(),
        lambda W: setattr(W, "data", W.data.clone().div_(3)),
    ):
        cache.get(W, A, B, SCALE).fill_(7)
        write(W)
        assert (cache.get(W, A, B, SCALE) != 7).all()
        want = weight_norm(W, A, B, SCALE)
        assert torch.allclose(cache.get(W, A, B, SCALE).double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [(300, 500), (1000, 1000), (512, 3000), (3000, 512), (2048, 2048)])
def test_what_a_fingerprint_of_a_large_weight_cannot_miss(size):
    """A row, a column, s neighbours in either, a square of side 2 √s: wherever they lie."""
    read = sampled_entries(*size)
    spacing = int(sampled_columns(*size)[0].diff()[0])
    sums = torch.zeros(size[0] + 1, size[1] + 1, dtype=torch.int32)
    sums[1:, 1:] = read.int().cumsum(0).cumsum(1)
    side = int(2 * spacing**0.5)
    for a, b in ((side, side), (1, spacing), (spacing, 1)):
        inside = sums[a:, b:] - sums[:-a, b:] - sums[a:, :-b] + sums[:-a, :-b]
        assert inside.min() >= 1, (size, spacing, a, b)


def test_a_copy_starts_empty(layer):
    cache = NormCache()
    ours = cache.get(*layer, SCALE)
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, NormCache)
        ours.fill_(7)
        got = other.get(*layer, SCALE)
        assert storage(got) != storage(ours)
        assert agrees(got, *layer)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.norm_cache = NormCache()


def test_never_in_a_state_dict(layer):
    module = Module()
    module.norm_cache.get(*layer, SCALE)
    assert list(module.state_dict()) == ["weight"]
    assert [n for n, _ in module.named_buffers()] == []
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert agrees(loaded.norm_cache.get(*layer, SCALE), *layer)
    assert agrees(copy.deepcopy(module).norm_cache.get(*layer, SCALE), *layer)


def test_the_buffer_is_not_what_backward_reads(layer):
    W, A, B = layer
    cache = NormCache()
    m = torch.nn.Parameter(torch.ones(d))
    x = torch.randn(4, k)
    with saved_tensors() as kept:
        y = spectral_ops.dora_linear(x, W, A, B, m, scale=SCALE, norm=cache.get(W, A, B, SCALE))
    assert storage(cache.get(W, A, B, SCALE)) not in {storage(t) for t in kept}
    want = torch.autograd.grad(y, [A, B, m], torch.ones_like(y), retain_graph=True)
    A.data.mul_(3)
    cache.get(W, A, B, SCALE)  # the buffer now holds another norm
    A.data.div_(3)
    got = torch.autograd.grad(y, [A, B, m], torch.ones_like(y))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_threads(layer, monkeypatch):
    """A second thread that arrives while the first is computing waits, or computes its own: it never sees None."""
    from spectral_ops.functional import norm_cache

    inside, proceed = threading.Event(), threading.Event()
    real = norm_cache.column_norm_cached_op

    def slow(*args):
        inside.set()
        proceed.wait(1.0)
        return real(*args)

    monkeypatch.setattr(norm_cache, "column_norm_cached_op", slow)
    cache, results, errors = NormCache(), [], []

    def work():
        try:
            results.append(cache.get(*layer, SCALE).clone())
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    first, second = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.2)
    proceed.set()
    first.join(30)
    second.join(30)
    assert not errors
    assert len(results) == 2
    assert all(agrees(norm, *layer) for norm in results)


def test_compiling_always_recomputes(layer):
    """Inside torch.compile a cached value would be baked into the graph."""
    W, A, B = layer
    cache = NormCache()
    compiled = torch.compile(lambda: cache.get(W, A, B, SCALE).clone(), backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert agrees(compiled(), W, A, B)
            A.data.mul_(1.5)


def test_sharded_and_other_tensor_subclasses_always_recompute(layer, monkeypatch):
    from spectral_ops.functional import norm_cache

    class Sharded(torch.Tensor):
        pass

    W, A, B = layer
    monkeypatch.setattr(norm_cache, "column_norm_cached_op", None)  # reuse would call it, and fail
    cache = NormCache()
    assert agrees(cache.get(W.as_subclass(Sharded), A, B, SCALE).as_subclass(torch.Tensor), W, A, B)
    assert agrees(cache.get(W, A.detach().as_subclass(Sharded), B, SCALE).as_subclass(torch.Tensor), W, A, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_under_a_dispatch_mode_it_is_the_same_to_the_bit_and_nothing_is_written(dtype, backend):
    """A mode may keep results and skip calls, so none may write into memory that is there from call to call."""
    W, A, B = randn(70, 90, dtype=dtype, fan=90), randn(r, 90, dtype=torch.float32, fan=90), randn(70, r)
    cache, other = NormCache(), NormCache()
    want = cache.get(W, A, B, SCALE)
    kept = want.clone()
    want.fill_(7)
    with Recorder() as seen:
        got = cache.get(W, A, B, SCALE)
        again = other.get(W, A, B, SCALE)
    assert torch.equal(got, kept) and torch.equal(again, kept)
    assert (want == 7).all() and other._norm is None
    names = {name.split(".")[1] for name, _ in seen.calls if name.startswith("spectral_ops.")}
    assert names == {"column_norm"}


def keep_the_norm(ctx, op, *args, **kwargs):
    kept = op._schema.name.startswith("spectral_ops::column_norm")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_checkpoint_that_keeps_the_norm(layer):
    """Between the passes the layer runs with other weights (an average of them, say): the norm of the first stays."""
    W, A, B = layer
    cache, x = NormCache(), torch.randn(5, k, requires_grad=True)
    m = torch.nn.Parameter(torch.ones(d))

    def run(x):
        return spectral_ops.dora_linear(x, W, A, B, m, scale=SCALE, norm=cache.get(W, A, B, SCALE)).tanh()

    want = torch.autograd.grad(run(x).square().sum(), [x, A, B, m])
    y = checkpoint(run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep_the_norm))
    own = A.data
    A.data = 3 * own
    run(x)
    A.data = own
    got = torch.autograd.grad(y.square().sum(), [x, A, B, m])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_under_a_transform_nothing_is_reused(layer):
    W, A, B = layer
    cache = NormCache()
    cache.get(W, A, B, SCALE).fill_(7)
    stacked = torch.stack((A.detach(), 2 * A.detach()))
    norms = torch.func.vmap(lambda A: cache.get(W, A, B.detach(), SCALE))(stacked)
    assert all(agrees(norm, W, A, B) for norm, A in zip(norms, stacked, strict=True))

    def loss(A):
        norm = cache.get(W, A, B.detach(), SCALE)
        return (A * norm.sum()).sum(), norm

    gradient, norm = torch.func.grad(loss, has_aux=True)(A.detach())
    assert agrees(norm, *layer)
    torch.testing.assert_close(gradient, norm.sum().expand_as(A))  # none through the norm
    assert (cache._norm == 7).all()


def test_fake_tensors_leave_no_trace(layer):
    cache = NormCache()
    cache.get(*layer, SCALE)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t.detach()) for t in layer]
    with mode:
        inside = cache.get(*fake, SCALE)
    for norm in (inside, cache.get(*fake, SCALE)):
        assert norm.shape == (d,) and norm.dtype == torch.float32
    assert agrees(cache.get(*layer, SCALE), *layer)


def test_tensors_of_inference_mode_are_not_reused(layer):
    W, A, B = layer
    cache = NormCache()
    cache.get(W, A, B, SCALE).fill_(7)
    with torch.inference_mode():
        inner = 2 * A
        assert agrees(cache.get(W, inner, B, SCALE), W, inner.clone(), B)
        assert (cache.get(W, A, B, SCALE) == 7).all() or explain("column_norm_cached_", W).backend == "reference"
    assert torch.is_grad_enabled()


def test_a_weight_that_could_not_be_read_leaves_the_cache_empty(layer, monkeypatch):
    from spectral_ops.functional import norm_cache

    def fail(*args):
        raise MemoryError

    cache = NormCache()
    with monkeypatch.context() as patch:
        patch.setattr(norm_cache, "column_norm_cached_op", fail)
        with pytest.raises(MemoryError):
            cache.get(*layer, SCALE)
    assert torch.is_grad_enabled()
    assert agrees(cache.get(*layer, SCALE), *layer)


def test_a_square_weight_and_its_transpose():
    W, A, B = randn(24, 24), randn(r, 24), randn(24, r)
    cache = NormCache()
    for weight in (W, W.t()):
        assert agrees(cache.get(weight, A, B, SCALE), weight, A, B)
