"""The resident route (functional/rosa_resident.py): W holds round(W + S) between calls, and comes back bit for bit."""

import functools
import gc
import threading
import weakref

import pytest
import torch
from tensors import DTYPES, accumulate, ids, randn, sparse_pattern, storage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from spectral_ops import CSR, residents, rosa_linear
from spectral_ops.functional.csr import csr_gather_op
from spectral_ops.functional.rosa_resident import Claim, Residents

D, K, T = 12, 10, 5


@pytest.fixture(autouse=True)
def clean():
    """Every test starts, and ends, with no weight that holds a delta."""
    if residents._by_memory:
        gc.collect()  # what a test left behind is garbage by now
    for resident in list(residents._by_memory.values()):
        if resident.weight() is not None:
            residents.restore(resident.weight())
    yield


def new_csr(dtype=torch.float64, seed=0, shape=(D, K), trained=True) -> CSR:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    values = torch.randn(int(mask.sum()), generator=generator, dtype=torch.float64).to(dtype)
    return CSR.from_dense(mask).with_values(values.requires_grad_(trained)).validate()


def dense(csr):
    return csr.to_dense().detach().double()


def run(x, W, csr, **options):
    return rosa_linear(x, W, csr, route="resident", **options)


def rounded(W, csr):
    """round(W + S), the sum in at least float32."""
    wide = torch.promote_types(W.dtype, torch.float32)
    return torch.where(csr.with_values(torch.ones(csr.nnz).to(csr.dtype)).to_dense() != 0,
                       (W.to(wide) + csr.to_dense().detach().to(wide)).to(W.dtype), W)  # fmt: skip


@pytest.fixture(params=["Parameter", "view", "transposed", "slice", "tensor"])
def weight(request):
    """W of several kinds, and what lies around it."""
    if request.param == "Parameter":
        W = torch.nn.Parameter(randn(D, K), requires_grad=False)
    elif request.param == "view":
        W = randn(D * K).view(D, K)
    elif request.param == "transposed":
        W = randn(K, D).t()
    elif request.param == "slice":
        W = randn(D + 3, K + 4)[2 : D + 2, 1 : K + 1]
    else:
        W = randn(D, K)
    before = W._base.clone() if W._base is not None else W.detach().clone()
    yield W
    residents.restore(W)
    after = W._base if W._base is not None else W.detach()
    assert torch.equal(after.view(torch.int64), before.view(torch.int64)), "W did not come back bit for bit"
    assert not residents.holds(W)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_forward_and_backward(weight, backend):
    csr, x, b, dy = new_csr(), randn(T, K).requires_grad_(), randn(D).requires_grad_(), randn(T, D)
    A, B = randn(3, K).requires_grad_(), randn(D, 3).requires_grad_()
    total = weight.detach().clone() + dense(csr)
    y = run(x, weight, csr, lora_A=A, lora_B=B, bias=b, scale=0.5)
    want = x @ (total + 0.5 * (B @ A)).T + b
    torch.testing.assert_close(y, want)
    assert residents.holds(weight)
    torch.testing.assert_close(weight.detach(), total)
    inputs = [x, A, B, b]
    for got, right in zip(torch.autograd.grad(y, inputs, dy, retain_graph=True),
                          torch.autograd.grad(want, inputs, dy), strict=True):  # fmt: skip
        torch.testing.assert_close(got, right)
    (dS,) = torch.autograd.grad(y, csr.values, dy)
    (right,) = torch.autograd.grad(csr.to_dense(), csr.values, dy.T @ x.detach())
    torch.testing.assert_close(dS, right)


@pytest.mark.parametrize("values_dtype", DTYPES[1:], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=ids)
def test_it_equals_scatter_bit_for_bit(dtype, values_dtype, backend):
    csr, W = new_csr(values_dtype), randn(D, K, dtype=dtype)
    kept, x, dy = W.clone(), randn(T, K, dtype=dtype).requires_grad_(), randn(T, D, dtype=dtype)
    runs = []
    for route in ("resident", "scatter"):
        y = rosa_linear(x, W, csr, route=route, gradient_route="sampled")
        if route == "resident":
            assert torch.equal(W, rounded(kept, csr))
        runs.append([y, *torch.autograd.grad(y, [x, csr.values], dy)])
        residents.restore(W)
        assert torch.equal(W, kept)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_restore_is_by_copies_not_by_subtraction(dtype, backend):
    """Large values swallow W's digits, infinities and NaN would stay: all of W comes back, signed zeros included."""
    W = randn(D, K, dtype=dtype)
    W[0, 0], W[1, 1], W[2, 2], W[3, 3] = -0.0, float("inf"), float("nan"), torch.finfo(dtype).tiny
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    kept = W.clone().view(bits)
    for big in (1e4, float("inf"), float("nan"), -0.0, 1e-30):
        everywhere = CSR.from_dense(torch.ones(D, K, dtype=torch.bool))
        wide = accumulate(dtype)
        csr = everywhere.with_values(torch.full((D * K,), big, dtype=wide))
        run(randn(T, K, dtype=dtype), W, csr)
        assert residents.holds(W)
        residents.restore(W)
        assert torch.equal(W.view(bits), kept)


def test_a_hundred_steps_leave_no_trace():
    """Values that an optimizer moves, in bf16: what is written is always round(W0 + S), and W0 comes back."""
    W, csr = randn(D, K, dtype=torch.bfloat16), new_csr(torch.float32)
    kept, optimizer = W.clone(), torch.optim.AdamW([csr.values], lr=0.1)
    for step in range(100):
        run(randn(T, K, dtype=torch.bfloat16), W, csr).float().square().mean().backward()
        assert torch.equal(W, rounded(kept, csr)), step
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == 0:
            residents.restore(W)
            assert torch.equal(W, kept)
    residents.restore(W)
    assert torch.equal(W, kept)


# --- several users of one weight -------------------------------------------------------------------------------------


def test_two_deltas_on_one_weight_never_meet(weight):
    first, second, x, dy = new_csr(seed=1), new_csr(seed=2), randn(T, K).requires_grad_(), randn(T, D)
    W0 = weight.detach().clone()
    ys = {}
    for name, csr in (("a", first), ("b", second), ("a again", first), ("b again", second)):
        ys[name] = run(x, weight, csr)
        torch.testing.assert_close(ys[name], x @ (W0 + dense(csr)).T)
        torch.testing.assert_close(weight.detach(), W0 + dense(csr))
    for name in ("a", "b again", "b", "a again"):  # in another order than the forward passes
        csr = first if name.startswith("a") else second
        (dx,) = torch.autograd.grad(ys[name], x, dy)
        torch.testing.assert_close(dx, dy @ (W0 + dense(csr)))


def test_two_sets_of_values_of_one_pattern(weight):
    csr, x, dy = new_csr(), randn(T, K).requires_grad_(), randn(T, D)
    other = csr.with_values(randn(csr.nnz).requires_grad_())
    W0 = weight.detach().clone()
    a, b = run(x, weight, csr), run(x, weight, other)
    torch.testing.assert_close(b, x @ (W0 + dense(other)).T)
    for y, c in ((a, csr), (b, other)):
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ (W0 + dense(c)))


def test_tied_memory(weight):
    """Another tensor over the same memory is the same weight."""
    tied = weight.detach()
    first, second, x = new_csr(seed=1), new_csr(seed=2), randn(T, K)
    W0 = weight.detach().clone()
    run(x, weight, first)
    assert residents.holds(tied)
    torch.testing.assert_close(run(x, tied, second).detach(), x @ (W0 + dense(second)).T)
    residents.restore(tied)
    assert torch.equal(weight.detach(), W0)
    run(x, tied, second)
    residents.restore(weight)
    assert torch.equal(tied, W0)


@pytest.mark.parametrize("same_pattern", [True, False])
def test_parts_of_one_memory(same_pattern):
    """A fused q, k, v weight: three views of one tensor, with three patterns or with one mask for all."""
    whole = randn(3 * D, K)
    kept = whole.clone()
    parts = list(whole.split(D))
    x, dy = randn(T, K).requires_grad_(), randn(T, D)
    base = new_csr()
    csrs = [base.with_values(randn(base.nnz)) if same_pattern else new_csr(seed=i, trained=False) for i in range(3)]
    ys = [run(x, part, csr) for part, csr in zip(parts, csrs, strict=True)]
    for i in (2, 0, 1):
        W = kept[i * D : (i + 1) * D] + dense(csrs[i])
        torch.testing.assert_close(ys[i].detach(), x.detach() @ W.T)
        torch.testing.assert_close(torch.autograd.grad(ys[i], x, dy)[0], dy @ W)
    run(x, parts[1], csrs[1])
    for i in (0, 2, 1):
        assert torch.equal(residents.original(parts[i]), kept[i * D : (i + 1) * D])
    run(x, parts[1], csrs[1])
    assert torch.equal(residents.original(whole), kept)
    run(x, parts[2], csrs[2])
    residents.restore(whole)
    assert torch.equal(whole, kept)
    assert not residents.holds(parts[0])


def test_a_square_weight_and_its_transpose():
    W, csr = randn(8, 8), new_csr(shape=(8, 8), trained=False)
    kept, x = W.clone(), randn(T, 8)
    torch.testing.assert_close(run(x, W, csr), x @ (kept + dense(csr)).T)
    torch.testing.assert_close(run(x, W.t(), csr), x @ (kept.T + dense(csr)).T)
    torch.testing.assert_close(run(x, W, csr), x @ (kept + dense(csr)).T)
    assert torch.equal(residents.original(W.t()), kept.T)
    residents.restore(W.t())
    assert torch.equal(W, kept)


# --- adapters disabled in between ------------------------------------------------------------------------------------


def test_a_disabled_forward_between_forward_and_backward(weight):
    """DPO and PPO: the reference policy reads W while the policy's graph is alive."""
    csr, x, dy = new_csr(), randn(T, K).requires_grad_(), randn(T, D)
    W0 = weight.detach().clone()
    y = run(x, weight, csr)
    residents.restore(weight)
    assert torch.equal(weight.detach(), W0)
    torch.testing.assert_close(x @ weight.detach().T, x @ W0.T)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy, retain_graph=True)[0], dy @ (W0 + dense(csr)))
    assert torch.equal(residents.original(weight), W0)
    assert residents.holds(weight), "a copy of the original is no restore"
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ (W0 + dense(csr)))


def test_original_copies():
    W, csr = randn(D, K), new_csr(trained=False)
    kept = W.clone()
    for _ in range(2):
        copy = residents.original(W)
        assert storage(copy) != storage(W)
        assert torch.equal(copy, kept)
        copy.zero_()
        run(randn(T, K), W, csr)
    residents.restore(W)
    assert torch.equal(W, kept)


def test_restore_of_what_holds_nothing():
    W = randn(D, K)
    version = W._version
    residents.restore(W)
    assert W._version == version
    assert not residents.holds(W)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_exception_inside_restores(weight):
    csr = new_csr()
    with pytest.raises(KeyboardInterrupt), residents.holding(weight, csr.values.detach(), csr.pattern, Claim()):
        assert residents.holds(weight)
        raise KeyboardInterrupt
    assert not residents.holds(weight)


def test_a_product_that_fails_restores(weight, monkeypatch):
    csr, x = new_csr(), randn(T, K).requires_grad_()
    W0 = weight.detach().clone()

    def fails(*_args):
        raise RuntimeError("no memory")

    y = run(x, weight, csr)
    monkeypatch.setattr("spectral_ops.functional.rosa.rosa_linear_forward_op", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        run(x, weight, csr)
    monkeypatch.undo()
    assert torch.equal(weight.detach(), W0)
    torch.testing.assert_close(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.ones_like(y) @ (W0 + dense(csr)))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "AdamW fused"])
def test_a_backward_after_an_optimizer_step_raises_or_is_right(optimizer):
    """Its values are gone. What autograd notices by versions, and a fused optimizer hides, is noticed by the count of
    steps, unless W still holds what its own forward wrote."""
    kind, *fused = optimizer.split()
    csr, x, W = new_csr(torch.float32), randn(T, K).float().requires_grad_(), randn(D, K).float()
    step = getattr(torch.optim, kind)([csr.values], lr=0.5, **({"fused": True} if fused else {}))
    W0 = W.clone()
    total = W0 + csr.to_dense().detach()
    for disturb in (False, True):
        y = run(x, W, csr)
        total = W0 + csr.to_dense().detach()
        csr.values.grad = torch.ones_like(csr.values)
        step.step()
        if disturb:
            residents.restore(W)
        try:
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        except RuntimeError as error:
            assert "optimizer step" in str(error) or "modified by an inplace operation" in str(error)
        else:
            assert not disturb, "it used values that its forward did not"
            torch.testing.assert_close(dx, torch.ones_like(y) @ total)
    residents.restore(W)
    assert torch.equal(W, W0)


def test_the_error_of_a_stale_backward_restores_too():
    csr, x, W = new_csr(trained=False), randn(T, K).requires_grad_(), randn(D, K)
    kept = W.clone()
    y = run(x, W, csr)
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0).step()
    run(x.detach(), W, new_csr(seed=5, trained=False))
    with pytest.raises(RuntimeError, match="^values: got a backward after an optimizer step .*, wanted "):
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(W, kept)


def test_values_changed_in_place_before_backward_raise(weight):
    csr, x = new_csr(), randn(T, K).requires_grad_()
    y = run(x, weight, csr)
    with torch.no_grad():
        csr.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, torch.ones_like(y))


# --- lifetimes -------------------------------------------------------------------------------------------------------


def test_freed_weights_do_not_leak():
    csr = new_csr(trained=False)
    kept = []
    for make in (lambda: randn(D, K), lambda: randn(K, D).t(), lambda: torch.nn.Parameter(randn(D, K), False)):
        W = make()
        run(randn(T, K), W, csr)
        kept.append(weakref.ref(W._base if W._base is not None else W))
        del W
    gc.collect()
    assert [r() for r in kept] == [None] * 3
    fresh = randn(D, K)
    assert not residents.holds(fresh)
    assert not residents._by_memory, "entries of freed weights are kept"


def test_a_weight_kept_alive_by_its_view_alone():
    whole = randn(D + 2, K)
    W, csr = whole[1 : D + 1], new_csr(trained=False)
    kept = W.clone()
    run(randn(T, K), W, csr)
    del whole
    gc.collect()
    assert residents.holds(W)
    residents.restore(W)
    assert torch.equal(W, kept)


def test_a_new_weight_at_the_address_of_a_freed_one():
    csr, x = new_csr(trained=False), randn(T, K)
    for _ in range(30):
        W = randn(D, K)
        kept = W.clone()
        assert torch.equal(run(x, W, csr), x @ rounded(kept, csr).T)
        if torch.rand(()) < 0.5:
            residents.restore(W)
            assert torch.equal(W, kept)
        del W


def test_a_weight_whose_data_was_replaced():
    """As module.to() does: the new memory was never written to, and the old memory may be anybody's."""
    csr, x = new_csr(trained=False), randn(T, K)
    W = torch.nn.Parameter(randn(D, K), requires_grad=False)
    run(x, W, csr)
    new = randn(D, K)
    old = W.data
    W.data = new.clone()
    assert not residents.holds(W)
    residents.restore(W)
    residents.restore(old)
    assert torch.equal(W.data, new), "originals of the old memory were written into the new"
    y = run(x, W, csr)
    assert torch.equal(y, x @ rounded(new, csr).T)
    residents.restore(W)
    assert torch.equal(W.data, new)


def test_the_graph_keeps_no_copy_of_the_weight():
    csr, x = new_csr(torch.float32), randn(T, K).float().requires_grad_()
    W = randn(D, K).float()
    y = run(x, W, csr)
    gone = weakref.ref(W)
    torch.autograd.grad(y, x, torch.ones_like(y))
    del W, y
    gc.collect()
    assert gone() is None


# --- the house it lives in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["early stop", "no early stop", "reentrant"])
@pytest.mark.parametrize("between", ["nothing", "restored", "another delta"])
def test_activation_checkpointing(weight, how, between):
    """Two layers over one weight in one block: bit for bit what the block gives without, whatever W holds by then."""
    first, second, x, dy = new_csr(seed=1), new_csr(seed=2), randn(T, K), randn(T, D)
    W0 = weight.detach().clone()

    def block(x, a, b):
        y = run(x.sin(), weight, first.with_values(a))
        return (y @ y.T).tanh() @ run(x, weight, second.with_values(b))

    found = []
    for function in (block, functools.partial(checkpoint, block, use_reentrant=how == "reentrant")):
        inputs = [t.detach().clone().requires_grad_() for t in (x, first.values, second.values)]
        with set_checkpoint_early_stop(how == "early stop"):
            y = function(*inputs)
        if between == "restored":
            residents.restore(weight)
        elif between == "another delta":
            run(x, weight, new_csr(seed=3))
        y.backward(dy)
        found.append([y, *(t.grad for t in inputs)])
        residents.restore(weight)
        assert torch.equal(weight.detach(), W0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Seen(TorchDispatchMode):
    """The operators that a dispatch mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def results(x, W, csr, dy):
    inputs = [x.detach().clone().requires_grad_(), csr.values.detach().clone().requires_grad_()]
    y = run(inputs[0], W, csr.with_values(inputs[1]))
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_under_a_dispatch_mode_scatter_stands_in(dtype, backend):
    """The same numbers bit for bit, W held by nobody, and no write of W that the mode could keep or skip."""
    W, csr, x, dy = randn(D, K, dtype=dtype), new_csr(torch.float32), randn(T, K, dtype=dtype), randn(T, D, dtype=dtype)
    kept = W.clone()
    for held in (False, True):
        if held:
            run(x, W, new_csr(torch.float32, seed=9))
        with Seen() as mode:
            got = results(x, W, csr, dy)
            assert torch.equal(W, kept)
            assert not residents.holds(W)
        assert not any("scatter" in name or "gather_" in name for name in mode.names), mode.names
        want = results(x, W, csr, dy)
        assert residents.holds(W)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        residents.restore(W)


def test_a_mode_around_the_backward_alone_sees_no_write():
    csr, W, x = new_csr(), randn(D, K), randn(T, K).requires_grad_()
    y = run(x, W, csr)
    residents.restore(W)
    total = W + dense(csr)
    with Seen() as mode:
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        residents.restore(W)
        copy = residents.original(W)
    torch.testing.assert_close(dx, torch.ones_like(y) @ total)
    assert torch.equal(copy, W)
    assert [n for n in mode.names if "csr" in n or "rosa" in n] == ["rosa_linear_backward.default"]


@pytest.mark.parametrize("saved", ["products", "ours", "nothing", "everything"])
def test_selective_checkpointing(saved):
    """With another delta in W before the forward, and again before the backward."""
    csr, other, W, x, dy = new_csr(), new_csr(seed=4, trained=False), randn(D, K), randn(T, K), randn(T, D)
    kept = W.clone()
    keeps = {
        "products": lambda op: op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default),
        "ours": lambda op: op.namespace == "spectral_ops",
        "nothing": lambda op: False,
        "everything": lambda op: True,
    }[saved]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    found = []
    for selective in (False, True):
        inputs = [t.detach().clone().requires_grad_() for t in (x, csr.values)]

        def block(x, values):
            return run(x, W, csr.with_values(values)).sin().square()

        run(x, W, other)
        y = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts) if selective else block(*inputs)
        run(x, W, other)
        y.backward(dy)
        found.append([y, *(t.grad for t in inputs)])
        residents.restore(W)
        assert torch.equal(W, kept)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_under_autocast_a_copy_of_the_base_weight_is_cast():
    """W may hold W + S when autocast casts it: the copy must not."""
    csr, W, x, dy = new_csr(torch.float32), randn(D, K).float(), randn(T, K).float(), randn(T, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = results(x, W, csr, dy)
    run(x, W, csr)
    assert residents.holds(W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(x, W, csr, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradient_accumulation(weight):
    csr, W0 = new_csr(), weight.detach().clone()
    xs = [randn(T, K).requires_grad_() for _ in range(3)]
    ys = [run(x, weight, csr) for x in xs]
    for x, y in zip(xs, ys, strict=True):
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(y) @ (W0 + dense(csr)))
    torch.testing.assert_close(csr.to_dense().detach(), dense(csr))


def test_evaluation(weight):
    csr, x, W0 = new_csr(), randn(T, K), weight.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(run(x, weight, csr), x @ (W0 + dense(csr)).T)
    with torch.inference_mode():
        torch.testing.assert_close(run(x, weight, csr), x @ (W0 + dense(csr)).T)
    y = run(x.requires_grad_(), weight, csr)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y) @ (W0 + dense(csr)))


def test_threads_over_one_weight():
    W, wrong = randn(D, K), []
    kept = W.clone()

    def work(seed):
        csr, x = new_csr(seed=seed), randn(T, K).requires_grad_()
        total = kept + dense(csr)
        for i in range(25):
            y = run(x, W, csr)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            right = torch.allclose(y, x @ total.T) and torch.allclose(dx, torch.ones_like(y) @ total)
            if i % 5 == seed:
                residents.restore(W)
            if not (right and torch.equal(residents.original(W), kept)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    residents.restore(W)
    assert torch.equal(W, kept)


def test_an_empty_delta_and_no_tokens(weight):
    empty = CSR.from_dense(torch.zeros(D, K, dtype=torch.bool), dtype=torch.float64)
    x = randn(T, K)
    torch.testing.assert_close(run(x, weight, empty), x @ weight.detach().T)
    assert run(randn(0, K), weight, new_csr()).shape == (0, D)


def test_originals_are_all_that_is_kept():
    """nnz entries in W's dtype, not a copy of W."""
    own = Residents()
    W, csr = randn(D, K, dtype=torch.bfloat16), new_csr(torch.float32)
    want = torch.empty(csr.nnz, dtype=torch.bfloat16)
    csr_gather_op(want, W, csr.pattern.row_offsets, csr.pattern.columns)
    with own.holding(W, csr.values.detach(), csr.pattern, Claim()):
        (resident,) = own._by_memory.values()
        assert torch.equal(resident.originals, want)
    own.restore(W)


def test_one_write_for_a_forward_and_its_backward(monkeypatch):
    csr, x, W = new_csr(), randn(T, K).requires_grad_(), randn(D, K)
    from spectral_ops.functional.rosa_resident import Resident

    writes = []
    write = Resident.write
    monkeypatch.setattr(Resident, "write", lambda self, out, values: (writes.append(1), write(self, out, values)))
    y = run(x, W, csr)
    torch.autograd.grad(y.sum(), x)
    assert len(writes) == 1


def test_unsorted_columns(weight):
    offsets, columns = sparse_pattern(D, K)
    order = torch.cat([columns[a:b].flip(0) for a, b in zip(offsets, offsets[1:], strict=False)])
    csr = CSR(randn(columns.numel()).requires_grad_(), offsets, order, (D, K), sorted=False)
    W0, x, dy = weight.detach().clone(), randn(T, K).requires_grad_(), randn(T, D)
    y = run(x, weight, csr)
    torch.testing.assert_close(y, x @ (W0 + dense(csr)).T)
    dx, dS = torch.autograd.grad(y, [x, csr.values], dy)
    torch.testing.assert_close(dx, dy @ (W0 + dense(csr)))
    torch.testing.assert_close(dS, torch.autograd.grad(csr.to_dense(), csr.values, dy.T @ x.detach())[0])
