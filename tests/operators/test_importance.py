"""AdaLoRA's operators: importance of every parameter, scores, pruning, and the regulariser."""

from __future__ import annotations

import pytest
import torch
from importance import OPS, SIZES, make, samples
from instruments import Recorder, extension_loaded, poisoned, saved_tensors
from tensors import DTYPES, accumulate, ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spectral_ops
from spectral_ops import adalora_importance, adalora_prune, orthogonality_loss, use_backend
from spectral_ops._library import OPERATORS

LEADING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def expected(params, grads, exp_avg, uncertainty, beta1, beta2):
    """METHODS 1.6 in float64, one tensor after the other."""
    exp_avg, uncertainty, start = exp_avg.double(), uncertainty.double(), 0
    averages, variations, scores = [], [], []
    for layer, given in zip(params, grads, strict=True):
        products = []
        for p, g in zip(layer, given, strict=True):
            old_m, old_u = (s[start : start + p.numel()].view(p.shape) for s in (exp_avg, uncertainty))
            size = (p.double() * g.double()).abs()
            m = beta1 * old_m + (1 - beta1) * size
            u = beta2 * old_u + (1 - beta2) * (size - m).abs()
            averages.append(m.flatten())
            variations.append(u.flatten())
            products.append(m * u)
            start += p.numel()
        A, B, E = products
        scores.append(E.flatten() + A.mean(1) + B.mean(0))
    return torch.cat(averages), torch.cat(variations), torch.cat(scores)


def close(got, want, tolerance):
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max(), (got, want)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_importance_against_the_formula(dtype, layout, backend):
    params, grads, exp_avg, uncertainty = make(dtype, layout=layout)
    want = exp_avg, uncertainty, None
    for _ in range(2):
        want = expected(params, grads, *want[:2], 0.85, 0.7)
        with poisoned():
            scores = adalora_importance(params, exp_avg, uncertainty, grads, beta1=0.85, beta2=0.7)
    assert scores.dtype == exp_avg.dtype
    for got, wanted in zip((exp_avg, uncertainty, scores), want, strict=True):
        close(got, wanted, LEADING[dtype])


def test_without_scores_the_state_is_the_same(backend):
    params, grads, exp_avg, uncertainty = make()
    others = exp_avg.clone(), uncertainty.clone()
    assert adalora_importance(params, exp_avg, uncertainty, grads).numel() == sum(size[0] for size in SIZES)
    assert adalora_importance(params, *others, grads, score=False).shape == (0,)
    for got, want in zip((exp_avg, uncertainty), others, strict=True):  # rows end elsewhere, so roundings may differ
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_parameters_are_taken(backend):
    params, grads, exp_avg, uncertainty = make()
    others = exp_avg.clone(), uncertainty.clone()
    for layer, given in zip(params, grads, strict=True):
        for p, g in zip(layer, given, strict=True):
            p.requires_grad_().grad = g
    params[1][0].grad, grads[1] = None, (torch.zeros_like(grads[1][0]), *grads[1][1:])
    got = adalora_importance(params, exp_avg, uncertainty)
    assert not got.requires_grad
    assert torch.equal(got, adalora_importance(params, *others, grads))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_shares_of_split_tensors_add_up(parts, backend):
    """What FSDP does: rows of every tensor on several ranks, some of which hold none."""
    sizes = SIZES[:4]
    params, grads, *_ = make(torch.float64, sizes)
    n = sum(p.numel() for layer in params for p in layer)
    whole = adalora_importance(params, torch.zeros(n).double(), torch.zeros(n).double(), grads)
    total = 0
    for part in range(parts):

        def cut(t, part=part):
            rows = -(-t.shape[0] // parts)
            return t[min(part * rows, t.shape[0]) : (part + 1) * rows]

        def start(size, part=part):
            return min(part * -(-size // parts), size)

        own, theirs = ([tuple(map(cut, layer)) for layer in layers] for layers in (params, grads))
        n = sum(p.numel() for layer in own for p in layer)
        shards = [(start(r), start(r), d) for r, _, d in sizes]
        state = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        total = total + adalora_importance(own, *state, theirs, shards=shards)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)


def test_the_same_bits_on_any_number_of_threads(backend):
    params, grads, *state = make()
    results = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        own = [s.clone() for s in state]
        results.append([adalora_importance(params, *own, grads), *own])
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_nan_stays_in_its_triplet(backend):
    params, grads, *state = make()
    clean = adalora_importance(params, *(s.clone() for s in state), grads)
    grads[2][1][3, 7] = float("nan")
    got = adalora_importance(params, *state, grads)
    bad = SIZES[0][0] + SIZES[1][0] + 7
    assert got[bad].isnan() and got.isnan().sum() == 1
    rest = torch.arange(got.numel()) != bad
    assert torch.equal(got[rest], clean[rest])


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_prune_takes_the_lowest_of_all_layers(backend):
    E = [torch.randn(4, 1) + 9, torch.randn(3) + 9, torch.randn(5, 1).bfloat16() + 9]
    kept_E = [e.clone() for e in E]
    scores = torch.tensor([5.0, 1, 9, 3, 2, 8, 0, 7, 6, 4, 11, 10])
    keep = adalora_prune(E, scores, 5)
    assert torch.equal(keep, scores > 4)
    for e, before, k in zip(E, kept_E, keep.split([4, 3, 5]), strict=True):
        assert torch.equal(e.flatten(), torch.where(k, before.flatten(), 0))


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([1.0, 2, 3], 0, [1, 1, 1]),
        ([1.0, 2, 3], 3, [0, 0, 0]),
        ([2.0, 1, 2], 2, [0, 0, 0]),  # ties of the threshold go as well
        ([2.0, 1, 2], 1, [1, 0, 1]),
        ([0.0, 0, 0], 1, [0, 0, 0]),
        ([float("nan"), 1, 2], 1, [1, 0, 1]),
        ([float("inf"), 1, 2], 2, [1, 0, 0]),
    ],
)
def test_prune_at_the_threshold(scores, count, kept, backend):
    E = torch.full((3, 1), 7.0)
    keep = adalora_prune([E], torch.tensor(scores), count)
    assert keep.tolist() == [bool(k) for k in kept]
    assert torch.equal(E.flatten() != 0, keep)


def test_prune_of_a_part(backend):
    E = [torch.ones(2, 1), torch.ones(0, 1), torch.ones(1, 1)]
    keep = adalora_prune(E, torch.tensor([3.0, 1, 2, 5, 0, 4]), 3, first=[1, 4, 5])
    assert keep.tolist() == [True, False, False, True, False, True]
    assert [e.flatten().tolist() for e in E] == [[0, 0], [], [1]]


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    for args in samples()[name]:
        torch.library.opcheck(OPERATORS[name].default, args)


@pytest.mark.parametrize("name", OPS)
def test_cost(name):
    op = OPERATORS[name]
    for args in samples()[name]:
        want = op.cost(*args)
        for call in (op.default, op.overloads["reference"]):
            with FlopCounterMode(display=False) as counter:
                call(*args)
            assert counter.get_total_flops() == want.flops
    n = sum(r * (k + d + 1) for r, k, d in SIZES[:3])
    first, second = (op.cost(*args).bytes for args in samples()[name])
    if name == "importance_update_":  # p, dp, two running sums read; those written; the scores
        assert (first, second) == (6 * 4 * n + 4 * 18, 6 * 4 * n)
    else:
        assert first == second == 4 * 18 * 3 + 18


def test_the_compiled_kernel_runs_by_default():
    if not extension_loaded():
        pytest.skip("no compiled extension")
    assert spectral_ops.explain("adalora_importance").backend == "cpu"
    params, grads, *state = make()
    with use_backend("cpu"):
        adalora_importance(params, *state, grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[2].append(a[2][0]), "grads: got 9 tensors for 10 params"),
        (lambda a: a.__setitem__(0, a[0][:-1].clone()), "uncertainty: got"),
        (lambda a: a[3].__setitem__(1, a[3][1].double()), "grads: got scalar type 7, wanted that of params"),
        (lambda a: a[3].__setitem__(0, a[3][0][:, :-1]), "grads: got size"),
        (lambda a: a[4].extend([0] * 8), "shards: got 8 numbers"),
        (lambda a: a[4].extend([1, 0, 99] * 3), "shards: got A and E past the rank 5"),
    ],
)
def test_the_compiled_kernel_checks_what_it_reads(change, message):
    if not extension_loaded():
        pytest.skip("no compiled extension")
    args = [list(a) if isinstance(a, list) else a for a in samples()["importance_update_"][0]]
    change(args)
    with pytest.raises(RuntimeError, match=message):
        OPERATORS["importance_update_"].default(*args)


def test_compiled_without_a_graph_break():
    params, grads, *state = make(sizes=SIZES[:3])

    def step(params, exp_avg, uncertainty):
        scores = adalora_importance(params, exp_avg, uncertainty, grads)
        return scores, adalora_prune([E for _, _, E in params], scores, 7)

    results = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        own, states = [tuple(p.clone() for p in layer) for layer in params], [s.clone() for s in state]
        results.append([*function(own, *states), *states, *(p for layer in own for p in layer)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the regulariser -------------------------------------------------------------------------------------------------


def matrices(dtype=torch.float64, sizes=((4, 9), (4, 9), (3, 9), (5, 3), (4, 9))):
    """Rows to be made orthonormal, some of them the transpose of a contiguous matrix, as B is passed."""
    found = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    found.append(torch.randn(9, 4, dtype=torch.float64).to(dtype).requires_grad_())
    return found, [*found[:-1], found[-1].t()]


def formula(given, squared):
    norms = [torch.linalg.matrix_norm(X @ X.t() - torch.eye(len(X), dtype=X.dtype)) for X in given]
    return sum(n.square() if squared else n for n in norms) / len(norms)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=ids)
def test_orthogonality_against_the_formula(dtype, squared):
    leaves, given = matrices(dtype)
    want = formula([X.double() for X in given], squared)
    wanted = torch.autograd.grad(want, leaves)
    got = orthogonality_loss(given, squared)
    gradients = torch.autograd.grad(got, leaves)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert got.dtype == accumulate(dtype) and got.shape == ()
    for g, w in zip([got, *gradients], [want, *wanted], strict=True):
        close(g, w.double(), tolerance)
    assert all(g.dtype == X.dtype for g, X in zip(gradients, leaves, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss(given, squared), got)


def test_orthogonality_gradcheck():
    leaves, _ = matrices(sizes=((2, 5), (2, 5), (3, 4)))
    for squared in (False, True):
        assert torch.autograd.gradcheck(lambda *t, s=squared: orthogonality_loss([*t[:-1], t[-1].t()], s), leaves)


def test_orthonormal_rows_have_no_gradient():
    X = torch.eye(4, 9).requires_grad_()
    Y = torch.randn(4, 9).requires_grad_()
    loss = orthogonality_loss([X, Y])
    dX, dY = torch.autograd.grad(loss, [X, Y])
    assert torch.equal(dX, torch.zeros_like(X)) and dY.isfinite().all() and dY.any()
    assert torch.equal(torch.autograd.grad(orthogonality_loss([X], True), X)[0], torch.zeros_like(X))


def test_orthogonality_keeps_gram_matrices_alone_and_skips_frozen_ones():
    leaves, given = matrices(torch.float32)
    leaves[0].requires_grad_(False)
    with saved_tensors() as kept:
        loss = orthogonality_loss(given)
    own = {X.untyped_storage().data_ptr() for X in leaves}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in extra) == sum(X.shape[0] ** 2 for X in given)
    loss.backward()
    assert leaves[0].grad is None and all(X.grad is not None for X in leaves[1:])


def test_orthogonality_goes_by_shape_not_by_matrix():
    given = [torch.randn(4, 9) for _ in range(50)]
    with Recorder() as seen:
        orthogonality_loss(given)
    names = [name for name, _ in seen.calls if "detach" not in name]
    assert names.count("aten.bmm.default") == 1 and len(names) < 20, names


def test_orthogonality_compiles():
    leaves, given = matrices(torch.float32)
    torch._dynamo.reset()
    got = torch.compile(lambda: orthogonality_loss(given), fullgraph=True, backend="aot_eager")()
    want = orthogonality_loss(given)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


# --- errors ----------------------------------------------------------------------------------------------------------


def call(**changes):
    params, grads, exp_avg, uncertainty = make(sizes=SIZES[:2])
    arguments = {"params": params, "exp_avg": exp_avg, "uncertainty": uncertainty, "grads": grads} | changes
    return adalora_importance(**arguments)


def good(index=0):
    return make(sizes=SIZES[:2])[index]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: call(params=[]), r"params: got \[\] \(list\), wanted a sequence of"),
        (lambda: call(params=[(torch.ones(2, 2),) * 2]), r"wanted a sequence of \(lora_A, lora_B, lora_E\)"),
        (lambda: call(grads=good(1)[:1]), "grads: got 1 layers, wanted the 2 of params"),
        (lambda: call(grads=None), r"grads: got parameters without \.grad, wanted a call after backward"),
        (lambda: call(params=[(torch.ones(3),) * 3, good()[1]]), r"params\[0\]\[0\]: got \[3\] float32 on cpu, wanted"),
        (lambda: call(grads=[good(1)[1], good(1)[1]]), r"grads\[0\]: got \[1, 7\] float32 on cpu for params\[0\]\[0\]"),
        (lambda: call(params=[(*good()[0][:2], torch.ones(5, 2)), good()[1]]), r"params\[0\]\[2\]: got .*wanted lora"),
        (lambda: call(params=[(torch.ones(4, 21), *good()[0][1:]), good()[1]],
                      grads=[(torch.ones(4, 21), *good(1)[0][1:]), good(1)[1]]),
         r"params\[0\]\[0\]: got \[4, 21\].*wanted size 5 in dimension 0 \(the rank"),
        (lambda: call(exp_avg=torch.ones(3)), r"exp_avg: got \[3\].*wanted size 291 in dimension 0"),
        (lambda: call(uncertainty=torch.ones(291).double()), "uncertainty: got .* wanted a contiguous vector in"),
        (lambda: call(beta1=1.0), r"beta1: got 1\.0, wanted a number in \(0, 1\)"),
        (lambda: call(beta2="x"), r"beta2: got 'x' \(str\), wanted a number"),
        (lambda: call(shards=[(0, 0, 34)]), "shards: got 1 entries, wanted"),
        (lambda: call(shards=[(1, 0, 34), (0, 0, 3)]), r"shards\[0\]: first row of A: got 1, wanted at least 0 and at"),
        (lambda: call(shards=[(0, 0, 33), (0, 0, 3)]), r"shards\[0\]: out_features: got 33, wanted at least 34"),
        (lambda: adalora_prune([], torch.ones(3), 1), r"lora_E: got \[\] \(list\)"),
        (lambda: adalora_prune([torch.ones(2)], torch.ones(3), 1), "scores: got 3, wanted one for each of the 2"),
        (lambda: adalora_prune([torch.ones(2)], torch.ones(3), 1, first=[2]), r"first\[0\]: got 2, wanted at least 0"),
        (lambda: adalora_prune([torch.ones(2)], torch.ones(2), 3), "count: got 3, wanted at least 0 and at most 2"),
        (lambda: adalora_prune([torch.ones(2)], torch.ones(2), 1, first=[0, 1]), "first: got 2 entries"),
        (lambda: orthogonality_loss([]), r"params: got \[\] \(list\), wanted a model or a sequence of matrices"),
        (lambda: orthogonality_loss([torch.ones(2)]), r"params\[0\]: got \[2\].*wanted 2 dimensions \[r, m\]"),
        (lambda: orthogonality_loss(nn.Linear(2, 2)), "params: got a Linear that trains no AdaLoRA adapter"),
    ],
)  # fmt: skip
def test_errors(function, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        function()
    assert "wanted" in str(raised.value).splitlines()[-1]
