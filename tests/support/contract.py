"""What every public operator function promises, as one class of tests; test_<stem>.py gives it the families to run on.

test_gpu.py runs the same class with ``device = "cuda"``.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from budget import ROUNDINGS, assert_within_budget, check, evaluate
from instruments import Recorder, allocations, poisoned, saved_tensors
from problems import cotangent
from tensors import DTYPES, HALF, LARGE, SHAPES, TYPICAL, ids, storage
from torch.utils.checkpoint import checkpoint

MIXED = [(dtype, torch.float32) for dtype in HALF]


HELD_NORM = ("dora", "dora-recompute", "dora-dropout")  # c is detached: a numerical derivative must hold it
TWICE = {  # families whose layers are differentiable twice
    "group", "lora", "lora-dropout", "lora-diagonal", "lora-core-scaled-dropout", "block-sum", "bone", "bone-dropout",
    "mini", "mini-dropout", "disha-even", "disha-uneven", "disha-cyclic", "dora", "dora-recompute", "dora-given-norm",
    "dora-dropout", "bat", "bat-few-tokens", "bat-exact", "bat-row",
}  # fmt: skip


def gradients(problem, y, dy, **options):
    return torch.autograd.grad(y, [problem.inputs[n] for n in problem.trained()], dy, **options)


class Contract:
    """Parametrised over ``families`` by conftest.pytest_generate_tests."""

    device = "cpu"

    def build(self, family, shape=TYPICAL, dtype=torch.float64, adapter_dtype=None, **options):
        return family.build(shape, dtype, adapter_dtype, device=self.device, **options)

    # --- the mathematics ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=ids)
    @pytest.mark.parametrize("shape", SHAPES, ids=ids)
    def test_matches_dense_formula(self, family, shape, dtype, backend):
        check(self.build(family, shape, dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
    @pytest.mark.parametrize("shape", LARGE, ids=ids)
    def test_features_past_32767(self, family, shape, dtype):
        check(self.build(family, shape, dtype))

    @pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=ids)
    def test_float32_adapters_under_a_narrower_x(self, family, dtype, adapter_dtype, backend):
        if family.name == "block-sum":
            pytest.skip("block_sum has no parameters")
        check(self.build(family, ((2, 9), 33, 40, 7), dtype, adapter_dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=ids)
    @pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "expanded"])
    def test_layouts(self, family, layout, dtype, backend):
        """Strided rows, no unit stride, swapped leading dimensions and stride 0, for x, for dy and for both."""
        for x_layout, dy_layout in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            problem = self.build(family, ((3, 4), 21, 24, 5), dtype)
            check(problem.lay_out(x=x_layout), dy_layout)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=ids)
    def test_transposed_and_strided_weight(self, family, dtype, backend):
        for layout in ("transposed", "rows", "columns"):
            problem = self.build(family, ((6,), 21, 24, 5), dtype)
            matrices = [n for n in problem.inputs if n.rstrip("012") in ("weight", "A", "B", "D", "blocks")]
            check(problem.lay_out(**dict.fromkeys(matrices, layout)))

    @pytest.mark.parametrize("bias", [None, "frozen", "trained"])
    def test_bias(self, family, bias, backend):
        if family.name == "block-sum":
            pytest.skip("block_sum has no bias")
        check(self.build(family, bias=bias))
        check(self.build(family, ((4,), 17, 30, 3), torch.bfloat16, bias=bias))

    @pytest.mark.parametrize("scale", [0.0, -0.5, 64.0, 2.0**-10])
    def test_scale(self, family, scale, backend):
        if "scale" not in self.build(family).constants:
            pytest.skip("it has no scale")
        check(self.build(family, ((6,), 20, 28, 4), torch.float32, scale=scale))

    def test_gradcheck(self, family):
        problem = self.build(family, ((2, 3), 7, 6, 3))
        names = problem.trained()

        def function(*tensors):
            problem.inputs.update(zip(names, tensors, strict=True))
            return problem.call()

        if family.name in HELD_NORM:
            problem = self.build(family, ((2, 3), 7, 6, 3), given_norm=True)
        inputs = [problem.inputs[n] for n in names]
        assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0 if self.device == "cpu" else 1e-12)

    # --- what is not computed, not kept and not overwritten ---------------------------------------------------------

    def test_no_gradient_nobody_needs(self, family, backend):
        """Every subset of the trained tensors: the others get None, and no tensor of their shape is ever made."""
        T, k, d, r = 13, 21, 36, 5  # no two tensors of one shape
        whole = self.build(family, ((T,), k, d, r))
        names = whole.trained()
        dy = cotangent(whole, whole.call())
        want, path = evaluate(whole, dy)[1], evaluate(whole, dy, absolute=True)[1]
        for subset in range(2 ** min(len(names), 6)):
            frozen = [n for i, n in enumerate(names[:6]) if subset >> i & 1]
            problem = dataclasses.replace(whole, inputs=dict(whole.inputs)).freeze(*frozen)
            y = problem.call()
            if len(frozen) == len(names):
                assert not y.requires_grad
                continue
            with Recorder() as seen:
                grads = gradients(problem, y, dy, retain_graph=True)
            for name, grad in zip(problem.trained(), grads, strict=True):
                assert_within_budget(f"d{name} with {frozen} frozen", grad, want[name], path[name], y.dtype, 100)
            shapes = seen.shapes()
            for name in frozen:
                shape = tuple(problem.inputs[name].shape)
                if name in ("bias", "magnitude", "base_out"):  # these sizes serve other purposes too
                    continue
                if any(tuple(problem.inputs[n].shape) == shape for n in problem.trained()):
                    continue
                if name == problem.scaled or (name == "x" and {*problem.x_sized.split()} & {*problem.trained()}):
                    continue
                assert shape not in shapes, f"d{name} {shape} was computed although {name} is frozen: {seen.allocated}"
            low_rank = {n for n in problem.trained() if n in ("x", "A", "core")}
            if "A" in problem.inputs and not low_rank:
                calls = [a for name, a in seen.calls if "lowrank_backward" in name]
                assert calls or problem.trained() == ["values"]
                assert not any(a[7] for a in calls), "u was computed although nobody needs it"
            if "bias" in frozen:
                assert not any(a[9] for name, a in seen.calls if "lowrank_backward" in name), "db was computed"
            if backend == "default":
                self.no_memory_for(problem, y, dy, [n for n in frozen if n in ("x", "A", "B", "D", "core")])

    def no_memory_for(self, problem, y, dy, frozen):
        """The same inside compiled layers: no block of the size of a gradient that nobody needs, unless another has it
        too. Blocks of whole cache lines are left out: workspaces come in these."""
        wanted = {problem.inputs[n].numel() for n in problem.trained()} | {y.numel()}
        sizes = {
            n: problem.inputs[n].numel()
            for n in frozen
            if n != "x" or not {*problem.x_sized.split()} & {*problem.trained()}
        }
        sizes = {n: size * 8 for n, size in sizes.items() if size not in wanted and size * 8 % 64}
        if sizes and self.device == "cpu":
            made = allocations(lambda: gradients(problem, y, dy, retain_graph=True))
            for name, size in sizes.items():
                assert size not in made, f"d{name} was computed although it is frozen: {made}"

    def test_a_frozen_module_builds_no_graph(self, family, backend):
        problem = self.build(family)
        with torch.no_grad():
            y = problem.call()
        assert not y.requires_grad
        assert torch.equal(y, problem.call())
        problem.freeze(*problem.trained())
        assert not problem.call().requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(problem.call(), y, rtol=1e-12, atol=1e-12)

    def test_backward_twice(self, family, backend):
        problem = self.build(family, dtype=torch.float32)
        y = problem.call()
        dy = cotangent(problem, y)
        kept_y, kept_dy = y.detach().clone(), dy.clone()
        kept = {n: t.detach().clone() for n, t in problem.inputs.items()}
        first = gradients(problem, y, dy, retain_graph=True)
        first = [g.clone() for g in first]
        second = gradients(problem, y, dy)
        for name, a, b in zip(problem.trained(), first, second, strict=True):
            assert torch.equal(a, b), f"d{name} differs between two backward passes of one graph"
        assert torch.equal(y, kept_y)
        assert torch.equal(dy, kept_dy)
        for name, t in problem.inputs.items():
            assert torch.equal(t.detach(), kept[name]), f"{name} was overwritten"

    def test_gradients_alias_nothing(self, family, backend):
        problem = self.build(family, dtype=torch.float32)
        y = problem.call()
        dy = cotangent(problem, y)
        grads = dict(zip(problem.trained(), gradients(problem, y, dy), strict=True))
        theirs = {storage(t): n for n, t in problem.inputs.items()} | {storage(y): "y"}
        for name, grad in grads.items():
            assert storage(grad) not in theirs, f"d{name} aliases {theirs[storage(grad)]}"
            if name != "base_out":  # whose gradient may be dy itself
                assert storage(grad) != storage(dy), f"d{name} aliases dy"

    def test_the_result_may_be_overwritten(self, family, backend):
        """``y += residual`` works as it does behind nn.Linear, except where the saved y makes backward say so."""
        problem = self.build(family)
        y = problem.call()
        dy = cotangent(problem, y)
        want = gradients(problem, problem.call(), 2 * dy)
        y.mul_(2).add_(1)
        if family.name in ("dora", "dora-given-norm", "dora-update"):
            with pytest.raises(RuntimeError, match="overwritten in place before its backward.*recompute=True"):
                gradients(problem, y, dy)
            return
        for a, b in zip(gradients(problem, y, dy), want, strict=True):
            torch.testing.assert_close(a, b)

    def test_second_derivative(self, family):
        """Right where there is a formula for it; elsewhere an error, also where the incoming gradient is a constant."""
        problem = self.build(family, ((2,), 7, 6, 3), **({"given_norm": True} if family.name in HELD_NORM else {}))
        names = problem.trained()
        inputs = [problem.inputs[n] for n in names]

        def function(*tensors):
            problem.inputs.update(zip(names, tensors, strict=True))
            return problem.call()

        if family.name in TWICE:
            assert torch.autograd.gradgradcheck(function, inputs)
            return
        y = problem.call()
        for dy in (torch.ones_like(y), torch.ones_like(y).requires_grad_()):
            (dx,) = torch.autograd.grad(y, problem.inputs["x"], dy, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match="second derivative"):
                dx.sum().backward(retain_graph=True)

    def test_bit_reproducible(self, family, backend):
        for dtype in (torch.float32, torch.bfloat16):
            problem = self.build(family, ((130,), 48, 56, 9), dtype)
            dy = cotangent(problem, problem.call())
            runs = []
            for _ in range(3):
                y = problem.call()
                runs.append([y, *gradients(problem, y, dy)])
            for other in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))

    def test_reads_no_uninitialised_memory(self, family, backend):
        for shape in (TYPICAL, ((131,), 33, 40, 7)):
            for dtype in (torch.float32, torch.bfloat16):
                with poisoned():
                    problem = self.build(family, shape, dtype)
                    y = problem.call()
                    grads = gradients(problem, y, cotangent(problem, y))
                assert torch.isfinite(y).all()
                for name, grad in zip(problem.trained(), grads, strict=True):
                    assert torch.isfinite(grad).all(), f"d{name} holds poison"

    def test_nan_and_inf_propagate_and_stay_in_their_row(self, family, backend):
        problem = self.build(family, ((9,), 24, 40, 5), torch.float32, **({"p": 0.0} if "p" in family.options else {}))
        clean = problem.call().detach()
        for bad in (float("nan"), float("inf")):
            spoiled = problem.inputs["x"].detach().clone()
            spoiled[4, 7] = bad
            other = {**problem.inputs, "x": spoiled.requires_grad_()}
            y = problem.function(other)
            touched = ~torch.isfinite(y)
            assert touched[4].any(), f"{bad} in x vanished"
            rows = torch.arange(9, device=self.device) != 4
            assert torch.equal(y[rows], clean[rows]), f"{bad} in one row of x reached another"
        y = problem.call()
        dy = cotangent(problem, y)
        (want,) = torch.autograd.grad(y, problem.inputs["x"], dy, retain_graph=True)
        dy[2, 1] = float("inf")
        (dx,) = torch.autograd.grad(y, problem.inputs["x"], dy)
        assert not torch.isfinite(dx[2]).all(), "inf in dy vanished"
        rows = torch.arange(9, device=self.device) != 2
        assert torch.equal(dx[rows], want[rows])

    # --- memory -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
    def test_saved_bytes(self, family, dtype, backend):
        """Beyond parameters and x: T r elements, DoRA's y (its own output), vectors of d; nothing of [T, d] besides."""
        lead, k, d, r = shape = ((8, 4), 24, 40, 5)
        problem = self.build(family, shape, dtype)
        with saved_tensors() as kept:
            y = problem.call()
        own = {storage(t) for t in problem.inputs.values()}
        x_kept = any(storage(t) == storage(problem.inputs["x"]) for t in kept)
        of_h_alone = family.name == "block-sum" or {"D", "Vh", "lambda_d"} & problem.inputs.keys()
        assert x_kept == (not of_h_alone), "x: kept where it need not be"
        extra = {storage(t): t for t in kept if storage(t) not in own}
        big = [t for t in extra.values() if t.dim() > 1]
        size = dtype.itemsize
        got = sum(t.untyped_storage().nbytes() for t in big)
        assert got == problem.saved(problem.tokens, r, size), [tuple(t.shape) for t in big]
        small = [t for t in extra.values() if t.dim() <= 1]
        assert sum(t.numel() for t in small) <= 2 * d + 1 + problem.indices, [tuple(t.shape) for t in small]
        wide = [t for t in big if t.numel() >= problem.tokens * d]
        if family.name in ("dora", "dora-given-norm", "dora-update"):
            assert [storage(t) for t in wide] == [storage(y)], "the saved y is not the output itself"
        elif family.name not in ("dora-dropout", "dora-update-bias"):  # whose z [T, d] dm needs
            assert not wide

    def test_forward_makes_one_tensor_of_output_size(self, family):
        """At p = 0 a forward pass makes no [T, d] tensor but its result (none where it overwrites its base)."""
        if "p" in family.options or family.name in (
            "group",
            "block-sum",
            "dora-update-bias",
            "bat-exact",
            "hira-exact",
            "loha-tiles",
            "experts-routed",
        ):
            pytest.skip("promised without dropout, for one layer, in one precision")
        if family.name == "bat-few-tokens":
            pytest.skip("its kernel sums in parts, each of the output's size, and the promise is for many tokens")
        T, k, d, r = 256, 32, 512, 4
        for shape in (((T,), k, d, r), ((8, 32), k, d, r)):
            problem = self.build(family, shape, torch.bfloat16, torch.float32)
            update = "base_out" in problem.inputs
            problem.call()  # leaves behind what is kept from call to call
            large = [size for size in allocations(problem.call) if size >= T * d * 2]
            assert len(large) == 1, (large, "of an update: the clone that the test itself makes" if update else "")

    # --- the house it lives in ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_activation_checkpointing(self, family, reentrant, backend):
        problem = self.build(family, dtype=torch.float32)
        plain = problem.call()
        dy = cotangent(problem, plain)
        names = problem.trained()
        for n in names:
            problem.inputs[n].grad = None
        want = gradients(problem, plain, dy)

        def function(*tensors):
            return problem.function({**problem.inputs, **dict(zip(names, tensors, strict=True))})

        torch.manual_seed(problem.seed)
        y = checkpoint(function, *(problem.inputs[n] for n in names), use_reentrant=reentrant)
        after = torch.get_rng_state()
        torch.rand(1)  # whatever else draws before backward must not change the recomputed mask
        y.backward(dy)
        assert torch.equal(y, plain)
        for n, w in zip(names, want, strict=True):
            assert torch.equal(problem.inputs[n].grad, w), f"d{n} differs under checkpointing"
        torch.manual_seed(problem.seed)
        problem.function(problem.inputs)
        assert torch.equal(torch.get_rng_state(), after), "checkpointing left the generator elsewhere"

    def test_autocast(self, family, backend):
        """Under bf16 autocast: bf16 products from float32 x, weight and adapters; no float32 copy of x is kept."""
        if family.name in ("block-sum", "csr-spmm"):
            pytest.skip("not a layer: autocast leaves it alone")
        problem = self.build(family, ((6, 3), 24, 40, 5), torch.float32)
        update = "base_out" in problem.inputs
        if update:
            problem.inputs["base_out"] = problem.inputs["base_out"].detach().bfloat16().requires_grad_()
        with torch.autocast(self.device, dtype=torch.bfloat16), saved_tensors() as kept:
            y = problem.call()
        assert y.dtype == torch.bfloat16
        for t in kept:
            if t.dtype == torch.float32 and t.dim() > 1:
                names = [n for n, p in problem.inputs.items() if n != "x" and storage(p) == storage(t)]
                assert names, f"a float32 {list(t.shape)} is kept for backward"
        dy = cotangent(problem, y)
        grads = gradients(problem, y, dy)
        want, want_grads = evaluate(problem, dy)
        path, path_grads = evaluate(problem, dy, absolute=True)
        # x, weight and bias are rounded on top of the usual chain
        judge = functools.partial(assert_within_budget, dtype=torch.bfloat16, length=100, roundings=ROUNDINGS + 3)
        judge("y", y, want, path)
        for name, grad in zip(problem.trained(), grads, strict=True):
            assert grad.dtype == problem.inputs[name].dtype
            judge(f"d{name}", grad, want_grads[name], path_grads[name])

    def test_float64_ignores_autocast(self, family):
        problem = self.build(family)
        want = problem.call()
        with torch.autocast(self.device, dtype=torch.bfloat16):
            y = problem.call()
        assert y.dtype == torch.float64
        assert torch.equal(y, want)

    def test_draws_from_the_generator_only_for_dropout(self, family):
        state = torch.cuda.get_rng_state if self.device == "cuda" else torch.get_rng_state
        problem = self.build(family, **({"p": 0.0} if "p" in family.options else {}))
        before = state()
        problem.function(problem.inputs)
        assert torch.equal(state(), before), "p = 0 drew from the generator"
        if "p" not in family.options:
            return
        problem = self.build(family)
        torch.manual_seed(3)
        first = problem.function(problem.inputs)
        second = problem.function(problem.inputs)
        torch.manual_seed(3)
        assert torch.equal(problem.function(problem.inputs), first), "manual_seed does not reproduce it"
        assert not torch.equal(second, first), "two calls share one mask"

    def test_backends_agree(self, family):
        """The dispatcher's choice and the reference, on the same problem and mask, to within the budget of both."""
        from spectral_ops import use_backend

        for dtype in (torch.float32, torch.bfloat16):
            problem = self.build(family, ((37,), 48, 56, 11), dtype)
            y = problem.call()
            dy = cotangent(problem, y)
            grads = gradients(problem, y, dy)
            path, path_grads = evaluate(problem, dy, absolute=True)
            with use_backend("reference"):
                other = problem.call()
                other_grads = gradients(problem, other, dy)
            judge = functools.partial(assert_within_budget, dtype=dtype, length=200)
            judge("y", y, other, path)
            for name, a, b in zip(problem.trained(), grads, other_grads, strict=True):
                judge(f"d{name}", a, b, path_grads[name])
