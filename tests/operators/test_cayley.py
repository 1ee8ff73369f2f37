"""The Cayley transform against an explicit inverse in float64: values, gradients, orthogonality after training.

test_library.py, test_triton.py and test_gpu.py run its operators like every other row's.
"""

import pytest
import torch
from budget import check_operator
from instruments import Recorder, extension_loaded, poisoned, saved_tensors
from samples import samples_of
from tensors import accumulate, storage

import spectral_ops
from spectral_ops import cayley, use_backend
from spectral_ops._library import OPERATORS

SHAPES = [(1, 1), (2, 2), (7, 7), (1, 5, 5), (6, 16, 16), (3, 33, 33), (2, 64, 64), (2, 65, 65), (0, 4, 4)]


def explicit(X):
    """Q by the definition, in X's dtype."""
    eye = torch.eye(X.shape[-1], dtype=X.dtype)
    K = (X - X.mT) / 2
    return (eye - K) @ torch.linalg.inv(eye + K)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(shape, dtype, backend):
    X = torch.randn(shape).to(dtype).requires_grad_()
    exact = X.detach().double().requires_grad_()
    want, got = explicit(exact), cayley(X)
    assert got.dtype == accumulate(dtype) and got.shape == X.shape
    G = torch.randn(shape).to(got.dtype)
    (wanted,) = torch.autograd.grad(want, exact, G.double())
    (gradient,) = torch.autograd.grad(got, X, G)
    assert gradient.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (got - want).norm() <= tolerance * max(want.norm(), 1)
    tolerance = max(tolerance, 2 * torch.finfo(dtype).eps)  # the gradient comes back in X's dtype
    assert (gradient - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(gradient, -gradient.mT)


@pytest.mark.parametrize("r", [2, 3, 5, 7, 9, 15, 23, 31, 33, 63, 65, 100, 127, 129, 130])
@pytest.mark.parametrize("name", ["cayley_forward", "cayley_backward"])
def test_any_size(name, r):
    """Panels, vectors and tiles that are cut short, and several of them."""
    for dtype in (torch.float64, torch.float32):
        for args in samples_of(name, dtype=dtype, T=2, r=r):
            with poisoned():
                check_operator(OPERATORS[name], OPERATORS[name].default, args)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 5), (1, 1)])
def test_gradcheck(shape, backend):
    assert torch.autograd.gradcheck(cayley, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts(layout, backend):
    X = {
        "transposed": torch.randn(3, 6, 6, dtype=torch.float64).mT,
        "strided": torch.randn(6, 12, 12, dtype=torch.float64)[::2, ::2, ::2],
        "expanded": torch.randn(6, 6, dtype=torch.float64).expand(3, 6, 6),
    }[layout]
    torch.testing.assert_close(cayley(X), explicit(X))
    assert torch.autograd.gradcheck(cayley, X.clone(memory_format=torch.preserve_format).requires_grad_())


def test_a_symmetric_matrix_gives_the_identity_exactly(backend):
    X = torch.randn(3, 9, 9)
    for symmetric in (X + X.mT, torch.zeros_like(X)):
        assert torch.equal(cayley(symmetric), torch.eye(9).expand(3, 9, 9))


def test_a_batch_is_its_matrices():
    X = torch.randn(5, 12, 12)
    assert torch.allclose(cayley(X), torch.stack([cayley(one) for one in X]), atol=1e-6)


def test_it_rotates():
    Q = cayley(torch.randn(4, 8, 8, dtype=torch.float64))
    assert torch.allclose(torch.linalg.det(Q), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("r", [8, 64])
def test_orthogonal_in_float32_after_1000_steps_of_adamw(r):
    """Towards random orthogonal matrices, which are far away: the rotations grow as large as training makes them."""
    X = torch.zeros(2, r, r, requires_grad=True)
    target = torch.linalg.qr(torch.randn(2, r, r))[0]
    optimizer = torch.optim.AdamW([X], lr=1e-2)
    for _ in range(1000):
        loss = (cayley(X) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert X.detach().abs().max() > 0.5, "X hardly moved"
    Q = cayley(X).detach()
    error = (Q.mT @ Q - torch.eye(r)).abs().max().item()
    print(f"r={r}: |QᵀQ - I|max {error:.1e} with |X|max {X.detach().abs().max():.1f}")
    assert error < 1e-5
    assert (Q.double() - explicit(X.detach().double())).abs().max() < 1e-4


def skew(kind, norm, n, r):
    """Matrices whose skew part has this norm: their eigenvalues spread down to 0, or all of that size."""
    X = torch.randn(n, r, r, dtype=torch.float64)
    K = (X - X.mT) / 2
    if kind == "rotated":
        turn = torch.block_diag(*[torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64)] * (r // 2))
        basis = torch.linalg.qr(X)[0]
        K = basis @ turn @ basis.mT
    return (K * (norm / torch.linalg.matrix_norm(K, 2)).view(-1, 1, 1)).float()


@pytest.mark.parametrize("norm", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("kind", ["spread", "rotated"])
@pytest.mark.parametrize("r", [8, 64, 130])
def test_accurate_where_the_rotation_is_extreme(kind, norm, r, backend):
    """No worse than the library's solve and autograd through it, far from I as near it, from Q alone."""
    X = skew(kind, norm, 4, r).requires_grad_()
    exact, G, eye = X.detach().double().requires_grad_(), torch.randn(4, r, r), torch.eye(r)
    want = explicit(exact)
    (wanted,) = torch.autograd.grad(want, exact, G.double())
    K, errors = (X - X.mT) / 2, []
    for Q in (cayley(X), torch.linalg.solve(eye + K, eye - K)):
        (got,) = torch.autograd.grad(Q, X, G)
        gradient = (torch.linalg.matrix_norm(got - wanted) / torch.linalg.matrix_norm(wanted)).max()
        orthogonal = torch.linalg.matrix_norm(Q.detach().mT @ Q.detach() - eye).max()
        errors.append((gradient, torch.linalg.matrix_norm(Q.detach() - want.detach()).max(), orthogonal))
    for (ours, theirs), floor in zip(zip(*errors, strict=True), (1e-6, 2e-5, 2e-5), strict=True):
        assert ours <= max(2 * theirs, floor), errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("r", [5, 40, 130])
def test_what_is_not_finite_ends_and_stays_in_its_matrix(r, bad, backend):
    X = torch.randn(3, r, r)
    clean = cayley(X)
    X[1, 2, 2] = X[1, 0, 3] = bad
    X.requires_grad_()
    Q = cayley(X)
    (gradient,) = torch.autograd.grad(Q, X, torch.ones_like(Q))
    assert torch.equal(Q[::2], clean[::2]) and not Q[1].isfinite().any()
    assert gradient[::2].isfinite().all() and not gradient[1].isfinite().any()


def test_the_same_bits_on_any_number_of_threads():
    X, results = torch.randn(70, 33, 33, requires_grad=True), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        Q = cayley(X)
        results.append((Q, *torch.autograd.grad(Q, X, torch.ones_like(Q))))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saves_q_alone():
    X = torch.randn(3, 16, 16, requires_grad=True)
    with saved_tensors() as kept:
        Q = cayley(X)
    assert [storage(t) for t in kept] == [storage(Q)]


def test_one_operator_each_way():
    """Nothing is factored in backward, and nothing is computed beside the operators."""
    X = torch.randn(3, 16, 16, requires_grad=True)
    with Recorder() as seen:
        Q = cayley(X)
        torch.autograd.grad(Q, X, torch.randn(3, 16, 16))
    names = [name for name, _ in seen.calls if "detach" not in name and "randn" not in name]
    assert names == ["spectral_ops.cayley_forward.default", "spectral_ops.cayley_backward.default"]


def test_large_batches_on_two_threads(two_threads, backend):
    """The library's own batches of this size come back wrong."""
    X = torch.randn(3, 160, 160)
    Q = cayley(X)
    assert (Q.mT @ Q - torch.eye(160)).abs().max() < 1e-5


def test_the_compiled_kernels_run_by_default():
    if not extension_loaded():
        pytest.skip("no compiled extension")
    assert spectral_ops.explain("cayley").backend == "cpu"
    with use_backend("cpu"):
        cayley(torch.randn(2, 5, 5, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cayley_forward", (torch.ones(3, 3),), "X: got 2 dimensions"),
        ("cayley_forward", (torch.ones(1, 3, 4),), "X: got 3 dimensions, or rows of another length"),
        ("cayley_forward", (torch.ones(1, 3, 3).long(),), "X: got scalar type 4"),
        ("cayley_backward", (torch.ones(2, 3, 3), torch.ones(1, 3, 3)), "G: got size 1 in dimension 0, wanted 2"),
        ("cayley_backward", (torch.ones(1, 3, 3), torch.ones(1, 4, 4)), "G: got size 4 in dimension 1, wanted 3"),
        ("cayley_backward", (torch.ones(1, 3, 3), torch.ones(1, 3, 3).double()), "G: got scalar type 7"),
        ("cayley_backward", (torch.ones(1, 3, 3).half(),) * 2, "Q: wanted float32 or float64"),
    ],
)
def test_the_compiled_kernels_check_what_they_read(name, args, message):
    if not extension_loaded():
        pytest.skip("no compiled extension")
    with pytest.raises(RuntimeError, match=message):
        OPERATORS[name].default(*args)


def test_no_graph_without_a_gradient():
    X = torch.randn(4, 4)
    assert not cayley(X).requires_grad
    with torch.no_grad():
        assert not cayley(X.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert torch.equal(cayley(X), cayley(X.clone()))


def test_backward_twice_and_double_backward():
    X = torch.randn(2, 5, 5, requires_grad=True)
    Q = cayley(X)
    G = torch.randn_like(Q).requires_grad_()
    first, second = (torch.autograd.grad(Q, X, G, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (dX,) = torch.autograd.grad(Q, X, G, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dX.sum().backward()


def test_autocast_leaves_it_in_float32():
    X = torch.randn(2, 9, 9, requires_grad=True)
    want = cayley(X)
    with torch.autocast("cpu", torch.bfloat16):
        got = cayley(X)
        (gradient,) = torch.autograd.grad(got, X, torch.ones_like(got))
    assert torch.equal(got, want) and torch.equal(gradient, torch.autograd.grad(want, X, torch.ones_like(got))[0])


def test_compile():
    X = torch.randn(2, 9, 9, requires_grad=True)
    torch._dynamo.reset()
    got, want = torch.compile(cayley, fullgraph=True, backend="aot_eager")(X), cayley(X)
    G = torch.randn_like(want)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, X, G)[0], torch.autograd.grad(want, X, G)[0])


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("X", TypeError, r"X: got 'X' \(str\), wanted a tensor \[r, r\] or \[n, r, r\]"),
        (torch.zeros(3, 3, dtype=torch.int64), TypeError, r"X: got \[3, 3\] int64 on cpu, wanted float64"),
        (torch.zeros(3), ValueError, r"X: got \[3\] float32 on cpu, wanted square matrices"),
        (torch.zeros(3, 4), ValueError, r"X: got \[3, 4\] float32 on cpu, wanted square matrices"),
        (torch.zeros(2, 3, 3, 3), ValueError, r"X: got \[2, 3, 3, 3\] float32 on cpu, wanted square"),
        (torch.zeros(2, 0, 0), ValueError, r"X: got \[2, 0, 0\] float32 on cpu, wanted square .* r >= 1"),
    ],
)
def test_wrong_arguments(X, error, message):
    with pytest.raises(error, match=message):
        spectral_ops.functional.cayley(X)
