"""The segments row (METHODS 1.7): segmented_lowrank_linear, segmented_lowrank_update and their operators."""

import importlib.util

import pytest
import torch
from budget import check, check_batched_gradients
from contract import Contract
from instruments import Recorder, extension_loaded, saved_tensors
from problems import FAMILIES, SEGMENTS, cotangent
from tensors import TYPICAL, randn, storage

import spectral_ops
from spectral_ops import _library
from spectral_ops._library import OPERATORS


class TestSegments(Contract):
    families = SEGMENTS


SEQUENCES = {  # over x [3, 5, k] and three adapters
    "one id per sequence": torch.tensor([2, -1, 0]),
    "one id for all": torch.tensor(1),
    "one adapter": torch.full((3, 5), 2, dtype=torch.int32),
    "none": torch.full((3, 5), -1),
    "sorted": torch.tensor([-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]).view(3, 5),
    "alternating": torch.arange(15).view(3, 5) % 3,
    "strided": (torch.arange(30).view(3, 10) % 4 - 1)[:, ::2],
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("family", [family.name for family in SEGMENTS])
def test_ids(family, name, backend):
    for dtype in (torch.float64, torch.bfloat16):
        check(FAMILIES[family].build(TYPICAL, dtype, ids=SEQUENCES[name]))


@pytest.mark.parametrize("ranks", [[3], [1, 2], [4, 4, 4, 4], [7, 1, 3, 2, 5, 8, 1, 6]], ids=str)
@pytest.mark.parametrize("family", ["segments", "segments-grouped"])
def test_numbers_of_adapters(family, ranks, backend):
    check(FAMILIES[family].build(((37,), 24, 40, 5), ranks=ranks))
    check(FAMILIES[family].build(((37,), 24, 40, 5), torch.bfloat16, torch.float32, ranks=ranks))


@pytest.mark.parametrize("family", [family.name for family in SEGMENTS])
def test_batched_gradients(family, backend):
    check_batched_gradients(FAMILIES[family].build())


def test_routes_agree():
    outputs = []
    for route in ("stacked", "grouped"):
        torch.manual_seed(3)
        problem = FAMILIES["segments"].build(TYPICAL, route=route, update=True)
        y = problem.call()
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        outputs.append((y, *torch.autograd.grad(y, [problem.inputs[n] for n in problem.trained()], dy)))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_route_goes_by_rows_and_stacked_columns():
    from spectral_ops.functional.segments import choose_route

    assert choose_route(8192, 4 * 16, "cuda", False) == "stacked"
    assert choose_route(8192, 32 * 16, "cuda", True) == "stacked", "its kernels draw no mask"
    assert choose_route(8, 32 * 16, "cuda", False) == "stacked"
    assert choose_route(8192, 2 * 16, "cpu", False) == "stacked"
    assert choose_route(1024, 3 * 16, "cpu", False) == "grouped"
    assert choose_route(1024, 8 * 16, "meta", False) == "stacked"
    assert choose_route(8192, 32 * 16, "cuda", False) == (
        "grouped" if importlib.util.find_spec("triton") else "stacked"
    )


def test_groups_are_stable_and_leave_out_strangers():
    """Rows of one adapter keep their order; ids outside [0, n) belong to no group."""
    from spectral_ops.functional.segments import group_rows

    order, offsets = group_rows(torch.tensor([2, -1, 0, 5, 0, 2, -7]), 3)
    groups = [order[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert groups == [[2, 4], [], [0, 5]]
    assert sorted(order.tolist()) == list(range(7))


def test_groups_of_any_ids_agree_with_the_compiled_ones():
    """int32 and int64, one id for several rows, strided ids, and ids that name no adapter."""
    layer, x = _library.LAYERS["segmented_linear_forward"], randn(12, 4)
    factors = [randn(2, 4) for _ in range(3)], [randn(5, 2) for _ in range(3)]
    for ids in (torch.tensor([2, -1, 0, 5, 0, 2]), torch.arange(24).flip(0)[::2] % 5 - 1, torch.zeros(1)):
        for dtype in (torch.int32, torch.int64):
            args = x, randn(5, 4), None, None, *factors, ids.to(dtype), None, [1.0, 2.0, 0.5], 0.0, True, True
            for got, want in zip(layer.default(*args), layer.overloads["reference"](*args), strict=True):
                torch.testing.assert_close(got, want)


def test_rows_out_of_range_are_refused():
    """The operators read order and offsets on the CPU, and say so where they would leave the tensors."""
    if not extension_loaded():
        pytest.skip("the reference leaves this to torch's indexing")
    x, A, order = randn(4, 6), randn(2, 3, 6), torch.arange(4)
    project = _library.OPERATORS["segment_project"].default
    for wrong, offsets in ((order + 1, [0, 2, 4]), (order - 1, [0, 2, 4]), (order, [0, 2, 5]), (order, [-1, 2, 4])):
        with pytest.raises(RuntimeError, match="order: got|offsets: got"):
            project(x, A, wrong, torch.tensor(offsets))


def test_equals_a_layer_for_each_adapter():
    """Each adapter's rows are what lowrank_linear makes of them, and rows without one what nn.Linear does."""
    v = FAMILIES["segments"].build(((40,), 24, 32, 5), torch.float32, ranks=[4, 4]).inputs
    ids = torch.arange(40) % 3 - 1
    A, B = [v["A0"], v["A1"]], [v["B0"], v["B1"]]
    y = spectral_ops.segmented_lowrank_linear(v["x"], v["weight"], A, B, ids, v["bias"], scales=[0.5, 2.0])
    for s, scale in enumerate((0.5, 2.0)):
        want = spectral_ops.lowrank_linear(v["x"], v["weight"], A[s], B[s], v["bias"], scale=scale)
        torch.testing.assert_close(y[ids == s], want[ids == s])
    want = torch.nn.functional.linear(v["x"], v["weight"], v["bias"])
    torch.testing.assert_close(y[ids == -1], want[ids == -1])


def test_an_adapter_without_rows_gets_zeros():
    for family in ("segments", "segments-grouped"):
        problem = FAMILIES[family].build(((6,), 24, 40, 5), ids=torch.zeros(6, dtype=torch.int64))
        y = problem.call()
        dA, dB = torch.autograd.grad(y, [problem.inputs["A1"], problem.inputs["B1"]], torch.ones_like(y))
        assert dA.shape == problem.inputs["A1"].shape and not dA.any()
        assert dB.shape == problem.inputs["B1"].shape and not dB.any()


def test_one_base_product():
    """However many adapters: x is read by the base product and the projection, and again for every dA together."""
    problem = FAMILIES["segments"].build(((12,), 24, 40, 5))
    with Recorder() as seen:
        y = problem.call()
        y.sum().backward()
    products = seen.products()
    W = storage(problem.inputs["weight"])
    assert sum(any(isinstance(t, torch.Tensor) and storage(t) == W for t in args) for args in products) == 2
    x = storage(problem.inputs["x"])
    assert sum(any(isinstance(t, torch.Tensor) and storage(t) == x for t in args) for args in products) == 3
    assert len([name for name, _ in seen.calls if "lowrank_backward" in name]) == 1


def test_frozen_adapters_are_left_alone():
    """One of two adapters trains: the other's gradients are None, and x is kept for the first alone."""
    problem = FAMILIES["segments"].build(TYPICAL).freeze("A0", "B0", "A2", "B2")
    check(problem)
    problem.freeze("A1")
    with saved_tensors() as kept:
        problem.call()
    assert storage(problem.inputs["x"]) not in {storage(t) for t in kept}
    check(problem)


def test_the_same_adapter_twice():
    """Gradients of a tensor that serves two ids add up."""
    v = FAMILIES["segments"].build(((9,), 24, 40, 5)).inputs
    ids = torch.arange(9) % 2
    y = spectral_ops.segmented_lowrank_linear(v["x"], v["weight"], [v["A0"]] * 2, [v["B0"]] * 2, ids)
    want = spectral_ops.lowrank_linear(v["x"], v["weight"], v["A0"], v["B0"])
    dy = randn(*y.shape)
    inputs = [v["x"], v["A0"], v["B0"]]
    grads, wanted = (torch.autograd.grad(out, inputs, dy) for out in (y, want))
    for got, w in zip((y, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got, w)


def arguments(**changed):
    v = {
        "x": randn(2, 3, 8), "weight": randn(6, 8), "lora_A_list": [randn(2, 8), randn(3, 8)],
        "lora_B_list": [randn(6, 2), randn(6, 3)], "segment_ids": torch.zeros(2, 3, dtype=torch.int32),
        "scales": [1.0, 2.0],
    }  # fmt: skip
    return v | changed


WRONG = {
    "a float": ({"segment_ids": torch.zeros(2, 3)}, TypeError, "segment_ids: got [2, 3] float32"),
    "a list": ({"segment_ids": [0, 1]}, TypeError, "segment_ids: got [0, 1] (list)"),
    "too short": ({"segment_ids": torch.zeros(3, dtype=torch.int32)}, ValueError, "segment_ids: got [3] int32"),
    "an id past the end": ({"segment_ids": torch.full((2, 3), 2)}, ValueError, "values from 2 to 2, wanted -1"),
    "an id below -1": ({"segment_ids": torch.full((2,), -2)}, ValueError, "values from -2 to -2"),
    "no adapter": ({"lora_A_list": [], "lora_B_list": []}, ValueError, "lora_A_list: got list of no adapters"),
    "no list": ({"lora_A_list": randn(2, 8)}, ValueError, "lora_A_list: got Tensor"),
    "one B too few": ({"lora_B_list": [randn(6, 2)]}, ValueError, "lora_B_list: got 1 tensors, wanted 2"),
    "another rank": ({"lora_B_list": [randn(6, 2), randn(6, 2)]}, ValueError, "adapter 1: lora_B: got [6, 2]"),
    "a scale too few": ({"scales": [1.0]}, ValueError, "scales: got 1 numbers, wanted 2"),
    "another route": ({"route": "sorted"}, ValueError, "route: got 'sorted', wanted one of 'auto', 'stacked'"),
    "grouped with dropout": (
        {"route": "grouped", "dropout_p": 0.5, "training": True},
        ValueError,
        "route: got 'grouped' with dropout_p 0.5",
    ),
    "a scalar scale": ({"scales": 2.0}, ValueError, "scales: got 2.0 (float), wanted 2"),
    "nan": ({"scales": [1.0, float("nan")]}, ValueError, "scales[1]: got nan"),
    "a trained weight": ({"weight": randn(6, 8).requires_grad_()}, ValueError, "weight: got requires_grad=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    changed, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        spectral_ops.segmented_lowrank_linear(**arguments(**changed))
    assert message in str(caught.value).splitlines()[-1]
    if "weight" in changed:
        return
    v = arguments(**changed)
    v.pop("weight")
    with pytest.raises(error) as caught:
        spectral_ops.segmented_lowrank_update(randn(2, 3, 6), **v)
    assert message in str(caught.value).splitlines()[-1]


PLACES = {  # of 9 places and 3 adapters
    "falling": ([0, 5, 4, 9], None, "offsets: got 4 after 5, wanted numbers that ascend from 0 to 9"),
    "past the end": ([0, 5, 5, 10], None, "offsets: got 10"),
    "negative": ([-1, 5, 5, 9], None, "offsets: got -1 after 0"),
    "a row past the end": ([0, 5, 5, 9], 6, "order: got"),
    "a negative row": ([0, 5, 5, 9], -1, "order: got"),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_wrong_places(name, dtype, backend):
    """An error on the CPU, whatever they are, and nothing written."""
    ends, row, message = PLACES[name]
    offsets, order = torch.tensor(ends, dtype=dtype), None if row is None else torch.tensor([*range(6), 0, 1, row])
    x, h, A, out = randn(6 if row else 9, 8), randn(9, 2), randn(3, 2, 8), torch.zeros(6 if row else 9, 8).double()
    calls = [
        lambda: OPERATORS["segment_project"](x, A, order, offsets),
        lambda: OPERATORS["segment_lift_"](out, h, A.mT, order, offsets),
        lambda: OPERATORS["segment_outer"](h, x, order, offsets),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        assert message in str(caught.value)
    if extension_loaded("cpu") and backend != "reference":
        assert not out.any()


def test_threads_do_not_matter():
    """Many experts of few rows, and one of many."""
    if not extension_loaded("cpu"):
        pytest.skip("the reference leaves it to torch's products")
    offsets = torch.tensor([0, *range(20, 660, 20), 1700, 1700], dtype=torch.int32)
    x, A, u = randn(1700, 300).float(), randn(34, 5, 300).float(), randn(1700, 5).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = torch.ones(1700, 300)
            OPERATORS["segment_lift_"](out, u, A.mT, None, offsets)
            h, dA = OPERATORS["segment_project"](x, A, None, offsets), OPERATORS["segment_outer"](u, x, None, offsets)
            found.append((out, h, dA))
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize("order", [None, "shuffled"])
def test_random_places_raise_or_are_right(order, backend):
    torch.manual_seed(0)
    raised = 0
    for _ in range(200):
        n, P = (int(i) for i in torch.randint(1, 6, (2,)))
        offsets = torch.randint(-1, P + 2, (n + 1,))
        if torch.rand(()) < 0.7:
            offsets = offsets.sort().values
        x, A = randn(P, 4, dtype=torch.float64), randn(n, 2, 4, dtype=torch.float64)
        places = None if order is None else torch.randperm(P)
        good = offsets[0] >= 0 and offsets[-1] <= P and bool((offsets.diff() >= 0).all())
        try:
            h = OPERATORS["segment_project"](x, A, places, offsets)
        except (ValueError, RuntimeError) as error:
            assert not good and "offsets: got" in str(error)
            raised += 1
            continue
        assert good
        rows = x if places is None else x[places]
        own = torch.searchsorted(offsets, torch.arange(P), right=True) - 1
        want = torch.einsum("pk,prk->pr", rows, A[own.clamp(0, n - 1)])
        want[(own < 0) | (own >= n)] = 0
        torch.testing.assert_close(h, want)
    assert 20 < raised < 180


def test_update_overwrites_a_fresh_base():
    problem = FAMILIES["segments-update-dropout"].build(TYPICAL, p=0.0)
    v = problem.inputs
    As, Bs = [v["A0"].detach()], [v["B0"].detach()]
    base = v["base_out"].detach().clone()
    out = spectral_ops.segmented_lowrank_update(base, v["x"].detach(), As, Bs, torch.zeros(3, dtype=torch.int32))
    assert storage(out) == storage(base)


def test_cotangent_of_a_sum():
    """The gradient of a sum arrives with stride 0."""
    problem = FAMILIES["segments"].build(TYPICAL)
    y = problem.call()
    (got,) = torch.autograd.grad(y.sum(), problem.inputs["A0"], retain_graph=True)
    (want,) = torch.autograd.grad(y, problem.inputs["A0"], torch.ones_like(cotangent(problem, y)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("route", ["stacked", "grouped"])
def test_a_buffer_of_ids_that_serves_the_next_batch_too(route):
    """The grouped route keeps its own order and offsets; the stacked one reads the ids again, and autograd says so."""
    problem = FAMILIES["segments"].build(TYPICAL, dtype=torch.float64)
    v, ids = problem.inputs, torch.tensor([0, 1, -1], dtype=torch.int32)
    args = v["x"], v["weight"], [v["A0"], v["A1"]], [v["B0"], v["B1"]]
    want = torch.autograd.grad(
        spectral_ops.segmented_lowrank_linear(*args, ids.clone(), route=route).sum(), [v["A0"], v["B1"]]
    )
    y = spectral_ops.segmented_lowrank_linear(*args, ids, route=route)
    ids.copy_(torch.tensor([1, 0, 0]))
    if route == "stacked":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return
    for got, wanted in zip(torch.autograd.grad(y.sum(), [v["A0"], v["B1"]]), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("route", ["stacked", "grouped"])
def test_what_was_saved_may_come_back_in_another_layout(route):
    problem = FAMILIES["segments"].build(TYPICAL)
    v, ids = problem.inputs, torch.tensor([0, 1, -1], dtype=torch.int32)
    names = ["A0", "B0", "A1", "B1"]

    def gradients():
        y = spectral_ops.segmented_lowrank_linear(
            v["x"], v["weight"], [v["A0"], v["A1"]], [v["B0"], v["B1"]], ids, route=route
        )
        return torch.autograd.grad(y, [v[n] for n in names], torch.arange(y.numel(), dtype=y.dtype).view(y.shape))

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t if t.dim() != 2 else t.t().contiguous().t()):
        got = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
