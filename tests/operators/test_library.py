"""The operator library: implementations, which of them runs, schemas, fake kernels and cost formulas."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from budget import check_operator
from instruments import ROOT, extension_loaded, extension_waived, fresh_python, opchecks, overload_or_reason, results
from problems import FAMILIES, cotangent
from samples import OPERATOR_NAMES, SIZES, samples_of
from tensors import DTYPES, copied, ids, randn
from torch.utils.flop_counter import FlopCounterMode

import spectral_ops
from spectral_ops import BackendUnavailable, _library, _loader, explain, use_backend
from spectral_ops._library import OPERATORS

# --- what is there ---------------------------------------------------------------------------------------------------


def test_every_operator_of_these_rows_is_tested():
    """Here, unless it takes lists of tensors, and in its row's own file."""
    assert OPERATOR_NAMES and all("[]" in OPERATORS[name].schema for name in OPERATORS.keys() - {*OPERATOR_NAMES})
    for operator in OPERATORS.values():
        assert Path(__file__).with_name(f"test_{operator.stem}.py").is_file(), operator


def test_the_compiled_extension_is_loaded():
    """The tests mean the compiled kernels: without them this fails, unless the run says that it goes without."""
    if reason := extension_waived():
        pytest.skip(f"{reason}: this run is meant to go without the compiled kernels")
    extension = _loader.EXTENSIONS["cpu"]
    assert extension_loaded(), extension.error
    assert extension.operators, "it registers nothing"
    headers = {path.stem for folder in ("ops", "layers") for path in (ROOT / "csrc" / folder).glob("*.h")}
    everything = OPERATORS | _library.LAYERS
    absent = {name for name in everything.keys() - extension.operators if everything[name].stem in headers}
    assert absent == {"lowrank_matmul", "block_matmul", "experts_matmul"}, "a kernel was not bound"
    assert extension.operators <= {*OPERATORS, *_library.LAYERS}
    assert extension.info


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_overloads_and_schema(name):
    op = OPERATORS[name]
    assert op.schema.startswith(f"{name}(")
    assert set(op.overloads) == {"reference", "triton"}
    arguments = [a.name for a in op.default._schema.arguments]
    for overload in op.overloads.values():
        assert [str(a.type) for a in overload._schema.arguments] == [str(a.type) for a in op.default._schema.arguments]
    for function in (op.reference, op.fake, op.cost):
        assert list(inspect.signature(function).parameters) == arguments, function
    lines = [s for s in inspect.getsource(op.reference).splitlines() if s.strip()]
    assert len(lines) <= 40, "a reference has at most 40 lines"
    written = [a for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert bool(written) == name.endswith("_")


def test_schema_hash_follows_the_schemas(monkeypatch):
    before = _library.schema_hash()
    assert before == _library.schema_hash()
    monkeypatch.delitem(OPERATORS, "block_sum")
    assert _library.schema_hash() != before


def test_a_stale_extension_is_refused():
    """One that was built for other schemas is left out, says so, and the reference runs."""
    code = """
import sys, types
stale = types.ModuleType("spectral_ops._C")
stale.schema_hash, stale.operators, stale.build_info = "0000", ["block_sum"], ""
stale.register = lambda: sys.exit("registered")
sys.modules["spectral_ops._C"] = stale
import torch, spectral_ops
print(spectral_ops.explain("block_sum"))
print(spectral_ops.block_sum(torch.ones(4), 2).tolist())
"""
    done = fresh_python(code)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert "was built for operator schemas 0000" in done.stdout
    assert "make build" in done.stdout
    assert "[2.0, 2.0]" in done.stdout


def test_without_the_extension():
    done = fresh_python(
        "import torch, spectral_ops; print(spectral_ops.explain('block_sum', torch.ones(1)));"
        "print(spectral_ops.block_sum(torch.ones(4), 2).tolist())",
        SPECTRAL_OPS_NO_EXTENSION="1",
    )
    assert done.returncode == 0, done.stderr
    assert "block_sum: reference (cpu: SPECTRAL_OPS_NO_EXTENSION=1 is set)" in done.stdout
    assert "[2.0, 2.0]" in done.stdout


def test_importing_loads_no_kernel_module():
    done = fresh_python(
        "import sys, spectral_ops; print([m for m in sys.modules if m.startswith('spectral_ops.triton_kernels.')"
        " or m.split('.')[0] in ('peft', 'transformers', 'accelerate', 'bitsandbytes', 'rich', 'matplotlib')])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# --- every implementation of every operator --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_against_float64(name, backend, dtype, two_threads):
    op = OPERATORS[name]
    overload, reason = overload_or_reason(op, backend, "cpu")
    if overload is None:
        pytest.skip(reason)
    for size in SIZES:
        for args in samples_of(name, dtype=dtype, **size):
            check_operator(op, overload, args)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_without_tokens(name, backend):
    op = OPERATORS[name]
    overload, reason = overload_or_reason(op, backend, "cpu")
    if overload is None:
        pytest.skip(reason)
    for args in samples_of(name, T=0):
        check_operator(op, overload, args)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_is_bit_reproducible_on_any_number_of_threads(name, backend, two_threads):
    op = OPERATORS[name]
    overload, reason = overload_or_reason(op, backend, "cpu")
    if overload is None:
        pytest.skip(reason)
    for dtype in (torch.float32, torch.bfloat16):
        for args in samples_of(name, T=300, dtype=dtype):
            torch.set_num_threads(2)
            first, again = (results(op, overload, args) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            if backend == "cpu":  # a reference is free to leave the split to the library
                torch.set_num_threads(1)
                assert all(torch.equal(a, b) for a, b in zip(first, results(op, overload, args), strict=True))


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_writes_only_what_its_schema_says(name):
    op = OPERATORS[name]
    for args in samples_of(name):
        args = copied(args)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = op.default(*args)
        outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor) and t.numel()]
        for a, b, s in zip(args, before, op.default._schema.arguments, strict=True):
            if not isinstance(a, torch.Tensor):
                continue
            assert not any(t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for t in outputs)
            if s.alias_info is None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{name} wrote into {s.name}")


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_opcheck(name):
    op = OPERATORS[name]
    for args in samples_of(name):
        torch.library.opcheck(op.default, copied(args), test_utils=opchecks(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_fake_agrees_with_every_implementation(name, dtype):
    """Shape, dtype and contiguity of every output, with None for every optional argument and without."""
    op = OPERATORS[name]
    for args in samples_of(name, dtype=dtype):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        fake = op.fake(*meta)
        for backend in ("reference", "cpu"):
            overload, _ = overload_or_reason(op, backend, "cpu")
            if overload is None:
                continue
            real = overload(*copied(args))
            pairs = zip(*((o if isinstance(o, tuple) else (o,)) for o in (real, fake)), strict=True)
            for ours, theirs in pairs:
                if theirs is None:
                    assert ours is None
                    continue
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
                assert ours.is_contiguous()


def test_autocast_does_not_round_inside_the_reference():
    x, seed = randn(8, 16, dtype=torch.float32), torch.tensor([1])
    A = randn(3, 16, dtype=torch.float32)
    want = OPERATORS["dropout_project"].default(x, A, seed, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OPERATORS["dropout_project"].default(x, A, seed, 0.2), want)


# --- which one runs --------------------------------------------------------------------------------------------------


def test_explain():
    x = torch.ones(2, 4)
    choice = explain("block_sum", x)
    assert choice.operator == "block_sum"
    if extension_loaded():
        assert choice.backend == "cpu"
        assert choice.reason == "default on cpu"
    else:
        assert choice.backend == "reference"
        assert _loader.EXTENSIONS["cpu"].error in choice.reason
    assert explain(OPERATORS["block_sum"], x) == choice
    assert explain("block_sum") == choice
    assert "block_sum" in str(choice)
    for name in OPERATOR_NAMES:
        assert explain(name, x).reason
    meta = explain("block_sum", x.to("meta"))
    assert meta.backend == "reference" or meta.reason


def test_use_backend_nests_and_restores():
    assert _library.forced_backend is None
    with use_backend("cpu"):
        with use_backend("reference"):
            assert explain("block_sum").backend == "reference"
            assert explain("block_sum").reason == "forced"
        assert _library.forced_backend == "cpu"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert _library.forced_backend == "cpu"
    assert _library.forced_backend is None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_a_forced_backend_that_cannot_run_raises(name, backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    op = OPERATORS[name]
    args = samples_of(name)[0]
    with use_backend(backend):
        with pytest.raises(
            BackendUnavailable, match=f"backend '{backend}' was forced, but cannot run {name}: "
        ) as raised:
            op(*args)
        choice = explain(op, args[0])
    assert choice.backend == backend
    assert "it would raise: " in choice.reason
    assert choice.reason.removeprefix("forced, but it would raise: ") in str(raised.value)


def test_a_forced_backend_raises_in_backward_too():
    problem = FAMILIES["bone"].build()
    y = problem.call()
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="bone_linear_backward"):
        torch.autograd.grad(y, problem.inputs["x"], torch.ones_like(y))


def test_a_missing_cpu_kernel_is_named():
    for name in OPERATOR_NAMES:
        overload, reason = overload_or_reason(OPERATORS[name], "cpu", "cpu")
        if overload is not None:
            continue
        with use_backend("cpu"), pytest.raises(BackendUnavailable, match=f"cannot run {name}: "):
            OPERATORS[name](*samples_of(name)[0])
        assert name in reason or _loader.EXTENSIONS["cpu"].error == reason


@pytest.mark.parametrize(
    "family",
    ["lora", "dora", "bone", "lora-dropout", "bone-dropout", "mini", "bat", "bat-few-tokens", "bat-row",
     "rosa-spmm-dropout", "rosa-scatter", "rosa-sparse-only", "rosa-update", "segments", "segments-grouped"],
)  # fmt: skip
def test_forced_cpu_equals_default(family):
    """With the compiled kernels, forcing them changes nothing: they are what runs."""
    if not extension_loaded() and extension_waived():
        pytest.skip(extension_waived())
    problem = FAMILIES[family].build(dtype=torch.float32)
    y = problem.call()
    dy = cotangent(problem, y)
    names = problem.trained()
    want = torch.autograd.grad(y, [problem.inputs[n] for n in names], dy)
    try:
        with use_backend("cpu"):
            other = problem.call()
            got = torch.autograd.grad(other, [problem.inputs[n] for n in names], dy)
    except BackendUnavailable as error:
        missing = [n for n in OPERATOR_NAMES if f"cannot run {n}: {n} has no compiled cpu kernel" in str(error)]
        assert missing, error
        pytest.skip(f"empty cell of the grid: {error}")
    assert torch.equal(other, y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "triton"])
def test_environment_variable(backend):
    code = """
import torch, spectral_ops
from spectral_ops import BackendUnavailable
print(spectral_ops.explain("block_sum", torch.ones(1)))
try:
    print(spectral_ops.block_sum(torch.ones(4), 2).tolist())
except BackendUnavailable as error:
    print("BackendUnavailable:", error)
"""
    done = fresh_python(code, SPECTRAL_OPS_BACKEND=backend, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert f"block_sum: {backend} (forced" in done.stdout
    runs = backend == "reference" or (backend == "cpu" and extension_loaded())
    assert ("[2.0, 2.0]" in done.stdout) == runs
    assert ("BackendUnavailable: backend" in done.stdout) == (not runs)


# --- what it costs ---------------------------------------------------------------------------------------------------


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_flop_counter_counts_the_formula(name):
    """Once, not again for the operations that the reference is made of; on meta tensors the same."""
    op = OPERATORS[name]
    for args in samples_of(name):
        want = op.cost(*args).flops
        assert flops(lambda a=args: op.default(*copied(a))) == want
        assert flops(lambda a=args: op.overloads["reference"](*copied(a))) == want
        assert op.cost(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)) == op.cost(*args)


T, K, D, R = 64, 48, 40, 8


def test_flops_of_a_lora_layer():
    """Forward x Aᵀ, x Wᵀ, h Bᵀ; backward u = dy B, dB = dyᵀ h, dx = dy W + u A, dA = uᵀ x."""
    problem = FAMILIES["lora"].build(((T,), K, D, R), torch.float32, bias=None)
    y = []
    forward = flops(lambda: y.append(problem.call()))
    assert forward == 2 * T * (K * R + K * D + R * D)
    inputs = [problem.inputs[n] for n in ("x", "A", "B")]
    backward = flops(lambda: torch.autograd.grad(y[0], inputs, torch.ones_like(y[0])))
    assert backward == 2 * T * (D * R + D * R + D * K + R * K + R * K)


def test_flops_of_a_dora_layer():
    """LoRA's, g (one or two operations per element of y), Σ dy*y and the norm; no product with W beyond those."""
    problem = FAMILIES["dora-given-norm"].build(((T,), K, D, R), torch.float32)
    y = []
    forward = flops(lambda: y.append(problem.call()))
    products = 2 * T * (K * R + K * D + R * D)
    assert products <= forward <= products + 3 * T * D
    inputs = [problem.inputs[n] for n in ("x", "A", "B", "magnitude")]
    backward = flops(lambda: torch.autograd.grad(y[0], inputs, torch.ones_like(y[0])))
    products = 2 * T * (D * R + D * R + D * K + R * K + R * K)
    assert products + 2 * T * D <= backward <= products + 8 * T * D
    v = problem.inputs
    norm = flops(lambda: spectral_ops.column_norm(v["weight"], v["A"], v["B"], 0.75))
    by_hand = 2 * D * K + 2 * D * K * R + 2 * R * R * (K + D)  # ‖W‖², WAᵀ, AAᵀ and B·AAᵀ
    assert by_hand <= norm <= by_hand + 8 * D * R


def test_flops_of_a_bone_layer():
    """Forward k additions per token, h D and x Wᵀ; backward dy Dᵀ, hᵀ dy, dy W, and k additions of the tiled s."""
    problem = FAMILIES["bone"].build(((T,), K, D, R), torch.float32, bias=None)
    y = []
    forward = flops(lambda: y.append(problem.call()))
    assert forward == T * K + 2 * T * (R * D + K * D)
    inputs = [problem.inputs[n] for n in ("x", "D")]
    backward = flops(lambda: torch.autograd.grad(y[0], inputs, torch.ones_like(y[0])))
    assert backward == 2 * T * (R * D + R * D + K * D) + T * K


def test_flops_of_a_bat_layer():
    """Forward W (I + B) + B and x W'ᵀ; backward W' anew, dy W', dyᵀ x and its product with W. Few tokens: as many
    operations as x (I + B) Wᵀ takes, and no W'. Row: x (I + C), z Wᵀ, dy W, v C and vᵀ x."""
    weight = 2 * D * K * (R + 1)
    for name, T_, forward_, backward_ in (
        ("bat", T, weight + 2 * T * D * K, weight + 4 * T * D * K + D * K * (2 * R + 1)),
        ("bat-row", T, 2 * T * K * (R + 1) + 2 * T * D * K + T * D, 2 * T * D * K + T * D + 2 * T * K * (2 * R + 1)),
        ("bat", 4, 4 * 4 * D * K, 4 * 4 * D * K + 2 * 4 * D * K + D * K * (2 * R + 1)),
    ):
        problem = FAMILIES[name].build(((T_,), K, D, R), torch.float32, bias=None)
        y = []
        assert flops(lambda p=problem, y=y: y.append(p.call())) == forward_, (name, T_)
        inputs = [problem.inputs[n] for n in ("x", "blocks")]
        got = flops(lambda y=y, i=inputs: torch.autograd.grad(y[0], i, torch.ones_like(y[0])))
        assert got == backward_, (name, T_)


def test_flops_of_a_rosa_layer():
    """spmm: x Wᵀ and 2 T nnz; dx the same, dS 2 T nnz more. scatter: nnz additions to each copy of W."""
    for route, sparse in (("spmm", 2 * T), ("scatter", 1)):
        problem = FAMILIES["rosa-sparse-only"].build(
            ((T,), K, D, R), torch.float32, bias=None, route=route, gradient_route="sampled"
        )
        y, nnz = [], problem.inputs["values"].numel()
        assert flops(lambda p=problem, y=y: y.append(p.call())) == 2 * T * D * K + sparse * nnz
        inputs = [problem.inputs[n] for n in ("x", "values")]
        got = flops(lambda y=y, i=inputs: torch.autograd.grad(y[0], i, torch.ones_like(y[0])))
        assert got == 2 * T * D * K + sparse * nnz + 2 * T * nnz, route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_bytes_by_hand(dtype):
    """Every argument read once, every result written once, what is updated in place both."""
    s, a = dtype.itemsize, 4  # bytes of the working and of the accumulation dtype
    t, k, d, r = 6, 21, 34, 5

    def cost(name, index):
        return OPERATORS[name].cost(*samples_of(name, dtype=dtype)[index]).bytes

    assert cost("lowrank_matmul", 3) == s * (t * k + d * k + t * r + d * r + t * d)
    assert cost("lowrank_matmul", 1) == s * (t * k + d * k + t * r + d * r + t * d + d) + a * d
    assert cost("lowrank_update_", 1) == s * (2 * t * d + t * r + d * r)
    assert cost("lowrank_update_", 3) == s * (2 * t * d + t * r + d * r) + 2 * a * d
    assert cost("lowrank_backward", 2) == s * (t * d + t * r + d * r + t * r) + a * (d * r + d)
    everything = s * (t * d + t * r + d * r + t * d + d) + a * d + s * (t * r + t * d) + a * (d * r + d + d)
    assert cost("lowrank_backward", 1) == everything
    assert s * (d * k + r * k + d * r) <= cost("column_norm", 0) <= s * (d * k + r * k + d * r) + a * d
    assert cost("block_matmul", 0) == s * (t * k + d * k + t * r + t * d + d)
    assert cost("block_sum", 0) == s * (t * k + t * r)
    assert cost("block_tile_", 2) == s * (2 * t * k + t * r)
    assert cost("block_tile_", 0) == s * (t * k + t * r)
    assert cost("dropout_project", 0) == s * (t * k + r * k + t * r)
    assert cost("dropout_outer", 0) == s * (t * k + t * r) + a * r * k
    assert cost("dropout_lift_", 0) == s * (2 * t * k + t * r + r * k)
    assert cost("seeded_dropout", 0) == 2 * s * t * k
    dr, kr, nd, nk = d // r * r, k // r * r, d // r, k // r
    assert cost("bat_weight_", 1) == s * (2 * dr * kr + nd * r * r)
    assert cost("bat_weight_", 3) == (s + a) * dr * kr + a * nd * r * r
    assert cost("bat_matmul", 1) == s * (t * kr + dr * kr + nd * r * r + t * dr)
    assert cost("bat_contract_", 0) == 2 * s * dr * kr + a * nd * r * r
    assert cost("bat_mix", 1) == s * (2 * t * kr + nk * r * r + t * r)
    assert cost("bat_mix_backward_", 1) == s * (3 * t * kr + t * r + nk * r * r) + (s * nk * r * r)
    nnz = samples_of("csr_sddmm")[1][3].numel()
    indices = 4 * (nnz + d + 1)
    assert cost("csr_scatter_", 1) == s * 3 * nnz + indices
    assert cost("csr_scatter_", 2) == (s + a) * nnz + indices
    assert cost("csr_gather_", 1) == (a + s) * nnz + indices
    assert cost("csr_spmm_", 2) == s * (2 * t * d + t * k + nnz) + indices
    assert cost("csr_spmm_", 3) == s * (2 * t * d + t * k) + a * nnz + indices + 4 * nnz
    assert cost("csr_sddmm", 1) == s * (t * d + t * k) + a * nnz + indices
    assert cost("target_logprob", 0) == s * t * d + t * (8 + 2 * a)
    assert cost("cayley_forward", 0) == 2 * r * r * (s + a)
    assert cost("cayley_backward", 0) == 3 * 2 * r * r * a
    assert cost("softmax_gradient_", 0) == 2 * s * t * d + t * (8 + 2 * a)
