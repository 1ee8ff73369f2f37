"""The policy row (METHODS 1.8): token_logprobs, kl_to_anchor, preference_loss."""

import math

import pytest
import torch
from instruments import Recorder, poisoned, saved_tensors
from tensors import DTYPES, accumulate, ids, laid_out, randn, storage
from torch.utils.checkpoint import checkpoint

import spectral_ops
from spectral_ops import kl_to_anchor, preference_loss, token_logprobs, use_backend
from spectral_ops.functional import policy

# leading dimensions, k, V, chunk: a vector; one token; V no multiple of anything; a short last chunk; chunk past T
SHAPES = [
    ((7,), 12, 37, None),
    ((), 5, 3, None),
    ((2, 3), 16, 1, 4),
    ((2, 1, 5), 9, 131, 3),
    ((1,), 8, 64, 1),
    ((0,), 8, 12, None),
    ((2, 0), 9, 5, 2),
    ((67,), 24, 1500, 20),
    ((5,), 7, 11, 1000),
]


def problem(lead=(9,), k=12, V=37, dtype=torch.float64, ignored=True):
    """hidden, head, targets (every fourth ignored), dlogp; logits of size 4 or so."""
    T = math.prod(lead)
    hidden, head = randn(*lead, k, dtype=dtype), 4 * randn(V, k, dtype=dtype, fan=k)
    targets = torch.randint(0, V, lead)
    if ignored:
        targets.view(-1)[3::4] = -100
    return hidden.requires_grad_(), head.requires_grad_(), targets, randn(T, dtype=torch.float64).reshape(lead)


def dense(hidden, head, targets, temperature=1.0):
    """METHODS 1.8 with every logit in memory."""
    logp = torch.log_softmax(hidden @ head.T / temperature, -1)
    picked = logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, picked)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_matches_dense_formula(frozen, shape, dtype, backend):
    lead, k, V, chunk = shape
    hidden, head, targets, dlogp = problem(lead, k, V, dtype)
    head.requires_grad_(not frozen)
    before = hidden.detach().clone(), head.detach().clone(), targets.clone()
    logp = token_logprobs(hidden, head, targets, chunk=chunk, temperature=0.7)
    assert logp.shape == targets.shape
    assert logp.dtype == accumulate(dtype)
    grads = torch.autograd.grad(logp, [hidden] if frozen else [hidden, head], dlogp.to(logp.dtype))
    h64, head64 = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    want = dense(h64, head64, targets, 0.7)
    want_grads = torch.autograd.grad(want, [h64, head64], dlogp.to(logp.dtype).double())[: len(grads)]
    eps, size = torch.finfo(dtype).eps, 40  # logits, after the division by the temperature
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=4 * size * eps)
    cancelled = size * torch.finfo(logp.dtype).eps * dlogp.norm()  # of 1 - p where p is 1
    for name, got, wanted, source, other in zip("hW", grads, want_grads, (hidden, head), (head, hidden), strict=False):
        assert got.dtype == source.dtype, name
        assert got.shape == source.shape, name
        error = (got.double() - wanted).norm()
        assert error <= 2 * size * eps * wanted.norm() + cancelled * other.double().norm(), name
    assert torch.equal(hidden, before[0]) and torch.equal(head, before[1]) and torch.equal(targets, before[2])
    assert not logp[targets == -100].any()
    assert not grads[0][targets == -100].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
def test_layouts(layout, dtype, backend):
    hidden, head, targets, dlogp = problem((3, 4), dtype=dtype)
    hidden = laid_out(hidden.detach(), layout)
    head = laid_out(head.detach(), "rows" if layout == "expanded" else layout)
    plain = hidden.contiguous().requires_grad_(), head.contiguous().requires_grad_()
    strided = hidden.requires_grad_(), head.requires_grad_()
    dlogp = laid_out(dlogp.to(accumulate(dtype)), layout)
    want = token_logprobs(*plain, targets.contiguous())
    logp = token_logprobs(*strided, laid_out(targets, "transposed"))
    torch.testing.assert_close(logp, want)
    for a, b in zip(
        torch.autograd.grad(logp, strided, dlogp), torch.autograd.grad(want, plain, dlogp.contiguous()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    hidden, head, targets, _ = problem((2, 4), 5, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, chunk=3, temperature=1.3), (hidden, head), nondet_tol=0.0
    )
    assert torch.autograd.gradcheck(
        lambda h: token_logprobs(h, head.detach(), targets, chunk=3, temperature=1.3), (hidden,), nondet_tol=0.0
    )
    logp, anchor = randn(9).requires_grad_(), randn(9)
    for estimator in ("k1", "k3"):
        assert torch.autograd.gradcheck(lambda p, e=estimator: kl_to_anchor(p, anchor, estimator=e), (logp,))
    pairs = randn(5).requires_grad_(), randn(5).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda a, b, r=reduction: preference_loss(a, b, reduction=r), pairs)


def test_double_backward_raises():
    hidden, head, targets, dlogp = problem()
    dlogp.requires_grad_()
    (dh,) = torch.autograd.grad(token_logprobs(hidden, head, targets), hidden, dlogp, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dh.sum().backward()
    (dh,) = torch.autograd.grad(token_logprobs(hidden, head.detach(), targets), hidden, dlogp, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dh.sum().backward()


# --- a frozen head: hidden's gradient is formed in forward -----------------------------------------------------------


def head_products(run, V: int) -> int:
    """How many products with the head ``run`` makes."""
    with Recorder() as seen:
        run()
    return sum("aten.mm" in name and any(V in t.shape for t in args[:2]) for name, args in seen.calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_a_frozen_head_is_multiplied_twice_and_never_in_backward(dtype, backend):
    """float16 looks at the logits in backward, where the loss scale is known."""
    hidden, head, targets, dlogp = problem((6,), 5, 31, dtype)
    head.requires_grad_(False)
    logp = []
    products = head_products(lambda: logp.append(token_logprobs(hidden, head, targets)), 31)
    back = head_products(lambda: torch.autograd.grad(logp[0], hidden, dlogp.to(logp[0].dtype)), 31)
    assert (products, back) == ((1, 2) if dtype == torch.float16 else (2, 0))


def test_a_value_alone_costs_one_product():
    hidden, head, targets, _ = problem((6,), 5, 31)
    with torch.no_grad():
        assert head_products(lambda: token_logprobs(hidden, head.detach(), targets), 31) == 1
    assert head_products(lambda: token_logprobs(hidden.detach(), head.detach(), targets), 31) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_saved_bytes_under_a_frozen_head(dtype):
    """The unit gradient [T, k] and targets; neither hidden nor the head, and nothing as long as the vocabulary."""
    hidden, head, targets, dlogp = problem((8, 4), 8, 300, dtype)
    with saved_tensors() as kept, Recorder() as seen:
        logp = token_logprobs(hidden, head.detach(), targets, chunk=4)
        torch.autograd.grad(logp, hidden, dlogp.float())
    own = {storage(targets)}
    assert [(tuple(t.shape), t.dtype) for t in kept if storage(t) not in own] == [((32, 8), dtype)]
    assert max(t.numel() for _, _, t in seen.allocated) == 4 * 300


def test_a_second_backward_finds_the_same_gradient():
    hidden, head, targets, dlogp = problem((9,))
    logp = token_logprobs(hidden, head.detach(), targets)
    first = torch.autograd.grad(logp, hidden, dlogp, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logp, hidden, 2 * dlogp)[0], 2 * first)


def test_an_ignored_token_passes_no_nan():
    """Whatever a caller's loss makes of tokens that are not there."""
    hidden, head, targets, dlogp = problem((9,))
    dlogp[targets == -100] = math.nan
    for W in (head, head.detach()):
        (grad,) = torch.autograd.grad(token_logprobs(hidden, W, targets), hidden, dlogp)
        assert not grad[targets == -100].any() and torch.isfinite(grad).all()


def test_kl_under_a_frozen_head():
    """Its gradient reaches hidden through the unit gradient, one factor per token."""
    hidden, head, targets, _ = problem((9,))
    anchor = token_logprobs(hidden, head, targets).detach() + 0.3 * randn(9)
    for estimator in ("k1", "k3"):
        grads = []
        for function in (token_logprobs, dense):
            kl = kl_to_anchor(function(hidden, head.detach(), targets), anchor, estimator=estimator)
            grads += torch.autograd.grad(kl.sum(), hidden)
        torch.testing.assert_close(*grads)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_no_tensor_of_tokens_by_vocabulary(dtype, backend):
    T, k, V, chunk = 64, 8, 300, 8
    hidden, head, targets, dlogp = problem((T,), k, V, dtype)
    with Recorder() as seen:
        logp = token_logprobs(hidden, head, targets, chunk=chunk)
        torch.autograd.grad(logp, [hidden, head], dlogp.float())
    assert max(t.numel() for _, _, t in seen.allocated) <= chunk * V < T * V / 4
    buffers = [s for name, s, _ in seen.allocated if tuple(s) == (chunk, V) and "new_empty" in name]
    assert len(buffers) == 2  # one forward, one backward
    if backend == "cpu":
        assert sum(t.numel() >= chunk * V for _, _, t in seen.allocated) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_saved_bytes(dtype):
    """Where the head trains, beyond the arguments: logsumexp [T], in float32."""
    hidden, head, targets, _ = problem((8, 4), 8, 300, dtype)
    with saved_tensors() as kept:
        token_logprobs(hidden, head, targets)
    own = {storage(t) for t in (hidden, head, targets)}
    extra = [t for t in kept if storage(t) not in own]
    assert [(tuple(t.shape), t.dtype) for t in extra] == [((32,), torch.float32)]


def test_chunks_fit_their_bound():
    for T, V, size in [(1, 49152, 4), (4096, 49152, 4), (8192, 128256, 2), (5, 10, 8), (0, 10, 4), (10, 0, 4)]:
        rows = policy.chunk_rows(T, V, size, "cpu")
        assert 1 <= rows <= max(T, 1)
        assert rows == 1 or rows * V * size <= policy.LOGITS_BYTES["cpu"]
    assert policy.chunk_rows(400, 2**20, 4, "cpu") == 8
    assert policy.chunk_rows(9, 2**20, 4, "cpu") == 5, "one full chunk and one of a single row"


def test_no_gradient_nobody_needs():
    for frozen in ("hidden", "head", "both"):
        hidden, head, targets, dlogp = problem((6,), 5, 31)
        if frozen != "head":
            hidden = hidden.detach()
        if frozen != "hidden":
            head = head.detach()
        logp = token_logprobs(hidden, head, targets)
        assert logp.requires_grad == (frozen != "both")
        if frozen == "both":
            continue
        leaf = head if frozen == "hidden" else hidden
        with Recorder() as seen:
            torch.autograd.grad(logp, leaf, dlogp)
        assert tuple((hidden if frozen == "hidden" else head).shape) not in seen.shapes()
    with torch.no_grad():
        assert not token_logprobs(*problem()[:3]).requires_grad


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_chunks_change_nothing(dtype, backend):
    """Not one bit of an output; gradients to rounding, as the library may split its sums by the number of rows."""
    hidden, head, targets, dlogp = problem((40,), 16, 90, dtype)
    runs = []
    for chunk in (None, 40, 1000):
        logp = token_logprobs(hidden, head, targets, chunk=chunk)
        runs.append([logp, *torch.autograd.grad(logp, [hidden, head], dlogp.float())])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    for chunk in (1, 7, 32):
        logp = token_logprobs(hidden, head, targets, chunk=chunk)
        eps = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(logp, runs[0][0], rtol=eps, atol=eps)
        for a, b in zip(torch.autograd.grad(logp, [hidden, head], dlogp.float()), runs[0][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=eps, atol=eps)


def test_reads_no_uninitialised_memory_and_repeats_to_the_bit(backend):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, targets, dlogp = problem((37,), 16, 90, dtype)
        runs = []
        with poisoned():
            for _ in range(2):
                logp = token_logprobs(hidden, head, targets, chunk=10)
                runs.append([logp, *torch.autograd.grad(logp, [hidden, head], dlogp.float())])
        assert all(torch.isfinite(t).all() for t in runs[0])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_large_logits_and_masked_ones(backend):
    """Nothing overflows; a logit of -inf has probability 0 and no gradient; NaN stays in its row."""
    logits = torch.zeros(6, 1500)
    logits[0, 7], logits[1] = 3e38, -100
    logits[2, :1200] = -math.inf  # more than one piece of nothing
    logits[3] = torch.linspace(-200, 200, 1500)
    logits[4, 1400] = math.nan
    logits[5, 3] = 90
    targets = torch.tensor([7, 5, 1300, 1499, 0, 3])
    logp, lse = policy.target_logprob_op(logits, targets, 1.0, -100)
    want = torch.log_softmax(logits.double(), 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert logp.isnan().tolist() == [False] * 4 + [True, False]
    gradient = logits.clone()
    policy.softmax_gradient_op(gradient, targets, lse, torch.ones(6), 1.0, -100)
    assert torch.isfinite(gradient[[0, 1, 2, 3, 5]]).all() and gradient[4].isnan().all()
    assert not gradient[2, :1200].any() and not gradient[0].any()
    sums = gradient[[1, 2, 3, 5]].sum(1)
    torch.testing.assert_close(sums, torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
def test_exponentials_are_right_to_the_last_digits(dtype, backend):
    """Over their whole range, of three logits at a time: the log of a sum of exponentials shows each of them."""
    x = torch.linspace(-80, 0, 20_001, dtype=dtype)
    logits = torch.stack([x, torch.full_like(x, -math.inf)], 1)
    gradient = logits.clone()
    count = x.numel()
    policy.softmax_gradient_op(
        gradient, torch.ones(count, dtype=torch.int64), torch.zeros(count, dtype=dtype),
        -torch.ones(count, dtype=dtype), 1.0, -100,
    )  # fmt: skip
    error = (gradient[:, 0].double() / x.double().exp() - 1).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps


def test_targets_out_of_range_poison_only_themselves(backend):
    """The operators, which a GPU calls without looking at the targets: NaN, and no memory but the row's."""
    logits = randn(4, 20, dtype=torch.float32)
    good, bad = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 20, -1, 2**40])
    logp, lse = policy.target_logprob_op(logits, bad, 1.0, -100)
    want, want_lse = policy.target_logprob_op(logits, good, 1.0, -100)
    assert torch.equal(lse, want_lse) and torch.equal(logp[0], want[0]) and logp[1:].isnan().all()
    gradient = logits.clone()
    policy.softmax_gradient_op(gradient, bad, lse, torch.ones(4), 1.0, -100)
    assert torch.isfinite(gradient[0]).all() and gradient[1:].isnan().all()


def test_autocast():
    hidden, head, targets, dlogp = problem((9,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = token_logprobs(hidden, head, targets)
    want = token_logprobs(hidden.bfloat16(), head.bfloat16(), targets)
    assert logp.dtype == torch.float32 and torch.equal(logp, want)
    grads = torch.autograd.grad(logp, [hidden, head], dlogp.float())
    assert [g.dtype for g in grads] == [torch.float32] * 2


def test_activation_checkpointing():
    hidden, head, targets, dlogp = problem((9,))
    plain = token_logprobs(hidden, head, targets)
    again = checkpoint(lambda h: token_logprobs(h, head, targets), hidden, use_reentrant=False)
    assert torch.equal(again, plain)
    for a, b in zip(*(torch.autograd.grad(y, [hidden, head], dlogp) for y in (again, plain)), strict=True):
        assert torch.equal(a, b)


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    _, head, targets, dlogp = problem((9,), 12, 37)
    tokens = torch.randint(0, 37, (9,))
    token_logprobs(head[tokens], head, targets).backward(dlogp)
    other = head.detach().clone().requires_grad_()
    dense(other[tokens], other, targets).backward(dlogp)
    torch.testing.assert_close(head.grad, other.grad)


# --- KL and preferences ----------------------------------------------------------------------------------------------


def test_kl_of_two_distributions():
    """Weighted by π, both estimators sum to KL(π‖anchor) over the vocabulary; k3 is nowhere negative."""
    logp, anchor = (torch.log_softmax(randn(50), 0) for _ in range(2))
    want = (logp.exp() * (logp - anchor)).sum()
    for estimator in ("k1", "k3"):
        per_token = kl_to_anchor(logp, anchor, estimator=estimator)
        torch.testing.assert_close((logp.exp() * per_token).sum(), want)
    assert (kl_to_anchor(logp, anchor) >= 0).all()
    assert torch.equal(kl_to_anchor(logp, anchor), kl_to_anchor(logp, anchor, estimator="k3"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
def test_k3_keeps_its_digits(dtype):
    """From 1e-12 to the tangent, on both sides, value and gradient; float128 stands behind float64."""
    numpy = pytest.importorskip("numpy")
    size = torch.logspace(-12, 0.99, 400, dtype=torch.float64)
    delta = torch.cat([-size, size]).to(dtype)
    logp = torch.zeros_like(delta, requires_grad=True)
    value = kl_to_anchor(logp, delta)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    x = delta.double().numpy().astype(numpy.longdouble)
    exact = numpy.expm1(x) - x
    term, series = x * x / 2, numpy.zeros_like(x)
    for n in range(3, 30):
        series += term
        term = term * x / n
    exact = torch.from_numpy(numpy.where(abs(x) < 1, series, exact).astype(numpy.float64))
    eps = torch.finfo(dtype).eps
    assert ((value.double() - exact).abs() <= 40 * eps * exact + torch.finfo(dtype).tiny).all()
    assert (value >= 0).all()
    torch.testing.assert_close(grad.double(), -torch.expm1(delta.double()), rtol=4 * eps, atol=0)


def test_k3_stays_finite():
    logp = torch.tensor([-10.0, -10.001, -60.0, -1e4, 1e4, 0.0], requires_grad=True)
    value = kl_to_anchor(logp, torch.zeros(6))
    (grad,) = torch.autograd.grad(value.sum(), logp)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()
    slope = math.expm1(10)
    torch.testing.assert_close(grad, torch.tensor([-slope, -slope, -slope, -slope, 1.0, 0.0]))
    torch.testing.assert_close(value[3].item(), slope - 10 + (1e4 - 10) * slope, rtol=1e-6, atol=0)
    assert value[5] == 0


def test_the_anchor_is_a_constant():
    logp, anchor = randn(4).requires_grad_(), randn(4).requires_grad_()
    for estimator in ("k1", "k3"):
        _, missing = torch.autograd.grad(
            kl_to_anchor(logp, anchor, estimator=estimator).sum(), [logp, anchor], allow_unused=True
        )
        assert missing is None
    for dtype in DTYPES:
        value = kl_to_anchor(logp.to(dtype), anchor.to(dtype))
        assert value.dtype == dtype


def test_preference_loss():
    chosen, rejected = randn(6, dtype=torch.float32).requires_grad_(), randn(6, dtype=torch.float32).requires_grad_()
    each = preference_loss(chosen, rejected, reduction="none")
    want = torch.log1p(torch.exp(rejected.double() - chosen.double()))
    torch.testing.assert_close(each.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(preference_loss(chosen, rejected), each.mean())
    torch.testing.assert_close(preference_loss(chosen, rejected, reduction="sum"), each.sum())
    dchosen, drejected = torch.autograd.grad(preference_loss(chosen, rejected), [chosen, rejected])
    sigma = torch.sigmoid(rejected - chosen) / 6
    torch.testing.assert_close(dchosen, -sigma)
    torch.testing.assert_close(drejected, sigma)
    assert preference_loss(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32


def test_preference_loss_of_far_rewards():
    far = torch.tensor([1e4, -1e4, 40.0], dtype=torch.float64)
    loss = preference_loss(far, torch.zeros(3, dtype=torch.float64), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e4, math.exp(-40)], dtype=torch.float64))


# --- wrong arguments (the rest are in test_errors.py) ---------------------------------------------------------------


def test_targets_are_looked_at_on_the_cpu():
    hidden, head, targets, _ = problem((4,), 5, 7)
    for bad in (7, -1, -101, 2**40):
        targets[1] = bad
        with pytest.raises(IndexError, match=rf"^targets: got {bad}, wanted token numbers in \[0, 7\) or ignore_index"):
            token_logprobs(hidden, head, targets)
    targets[1] = -1
    logp = token_logprobs(hidden, head, targets.clamp(min=-1), ignore_index=-1)
    assert not logp[[1, 3]].any() and (logp[[0, 2]] < 0).all()


def test_explain_names_its_operators():
    reason = spectral_ops.explain("token_logprobs").reason
    assert "target_logprob" in reason and "softmax_gradient_" in reason


def test_forced_backends():
    hidden, head, targets, dlogp = problem((9,), dtype=torch.float32)
    with use_backend("reference"):
        want = token_logprobs(hidden, head, targets)
    with use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable, match="target_logprob"):
        token_logprobs(hidden, head, targets)
    with use_backend("cuda"), pytest.raises(spectral_ops.BackendUnavailable, match="softmax_gradient_"):
        torch.autograd.grad(want, hidden, dlogp.float())
