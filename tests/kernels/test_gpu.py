"""On a GPU: the same contract and the same operator samples as on the CPU, and what only a GPU has (streams, graphs).

Run by ``make gpu``; everywhere else each test is skipped with the reason.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from budget import check, check_operator, evaluate
from contract import Contract
from instruments import overload_or_reason, poisoned, results
from matmul_case import FULL, Case, first_wrong, launched, tensors_of
from matmul_case import run as run_matmul
from oracles import weight_norm
from problems import BLOCKSUM, DORA, EXPERTS, FAMILIES, LOWRANK, SEGMENTS, cotangent
from samples import OPERATOR_NAMES, layer_samples, samples_of
from tensors import DTYPES, accumulate, copied, ids, randn
from torch.utils._pytree import tree_map_only

import spectral_ops
from spectral_ops import NormCache, triton_kernels, use_backend
from spectral_ops._library import LAYERS, OPERATORS
from spectral_ops.core import philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU (torch.cuda.is_available() is False)"),
]

BACKENDS = ("reference", "triton", "cuda")
samples = functools.partial(samples_of, device="cuda")
TILES = {name: tiles for name, op in OPERATORS.items() if (tiles := triton_kernels.tiles(op.stem, name))}
CALLS = [
    "lora",
    "lora-dropout",
    "lora-update-everything",
    "group",
    "dora",
    "dora-dropout",
    "bone",
    "mini",
    "bone-dropout",
    "experts",
    "experts-routed",
]
SIZES = [{}, {"T": 1, "r": 1}, {"T": 300, "k": 131, "d": 266, "r": 17}, {"T": 128, "k": 256, "d": 512, "r": 64}]


@pytest.fixture(autouse=True)
def full_float32():
    """The error budget is float32's: no TF32, and no half-precision partial sums inside the library's products."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction,
    )  # fmt: skip
    matmul.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = (
        before
    )


def implementation(name: str, backend: str):
    overload, reason = overload_or_reason(OPERATORS[name], backend, "cuda")
    if overload is None:
        pytest.skip(reason)
    return OPERATORS[name], overload


# --- every operator on every backend ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATOR_NAMES)
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_operator_against_float64(size, name, backend, dtype):
    op, overload = implementation(name, backend)
    for args in samples(name, dtype=dtype, **SIZES[size]):
        check_operator(op, overload, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize(
    "T, d, r", [(8192, 4096, 64), (600, 300, 39), (130, 2100, 64), (2000, 2040, 46), (300, 264, 64), (600, 300, 100)]
)
def test_operator_lowrank_backward_of_many_ranks(T, d, r, dtype):
    """u and dB alone: warpgroups and clusters on Hopper up to 64 ranks, the library's products above. Again and again,
    for an emulator does not know what a race is."""
    op, overload = implementation("lowrank_backward", "cuda")
    dy, h, B = (randn(*shape, dtype=dtype, device="cuda") for shape in ((T, d + 8 + -d % 8), (T, r + -r % 8), (d, r)))
    g = 1 + 0.1 * torch.randn(d, device="cuda")
    for scales in (None, g):
        for u, dB in ((True, True), (True, False), (False, True)):
            args = dy[:, :d], h[:, :r], B, 0.7, scales, None, None, u, dB, False, False
            check_operator(op, overload, args)
            first = results(op, overload, args)
            for _ in range(20 if r <= 64 else 1):
                for a, b in zip(first, results(op, overload, args), strict=True):
                    assert torch.equal(a, b)


# --- lowrank_matmul's form for Hopper, whichever route a call would take ----------------------------------------------

MATMULS = [  # T from 1, tails of everything, both directions of W and B, several tiles to a block, and layers' sizes
    Case(1, 8, 8, 8), Case(1, 4096, 4096, 16), Case(129, 264, 100, 17, W_by_columns=True), Case(257, 7, 1, 9),
    Case(600, 1032, 330, 40, torch.float16, True, True), Case(2000, 2040, 200, 256, B_by_columns=True),
    Case(4100, 4104, 520, 65, period=24, **FULL), Case(4096, 5000, 1000, 0, period=64),
    Case(8192, 4096, 4096, 16, **FULL), Case(8192, 4096, 4096, 64, torch.float16, True, True),
    Case(8192, 14336, 4096, 16), Case(2048, 4096, 14336, 16, W_by_columns=True, B_by_columns=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def matmul(tmp_path_factory):
    """The launch function without torch."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    root, made = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("matmul") / "matmul.so"
    source = root / "tests" / "kernels" / "cuda_emulator" / "matmul.cpp"
    flags = [
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-arch=sm_90a",
        "-Xcompiler",
        "-fPIC",
        "-shared",
        "-x",
        "cu",
    ]
    subprocess.run(["nvcc", *flags, "-I", root / "csrc", source, "-o", made], check=True)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("operand, by_columns", [("x", False), ("W", False), ("W", True), ("B", False), ("B", True)])
def test_operator_matmul_reads_every_element_where_it_is(matmul, operand, by_columns, dtype):
    """One stage of products for each direction of each operand. What fails names the field of the descriptor that the
    chip reads otherwise than we do; docs/HOPPER.md has what to look at then."""
    assert first_wrong(ctypes.CDLL(str(matmul)), operand, by_columns, dtype, "cuda") is None


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_operator_matmul_against_float64(matmul, case):
    run_matmul(ctypes.CDLL(str(matmul)), case, "cuda", again=20)


def test_operator_matmul_in_a_cuda_graph(matmul):
    """Its descriptions of the tensors are captured with the launch."""
    library, case = ctypes.CDLL(str(matmul)), Case(300, 600, 330, 24, **FULL)
    tensors = tensors_of(case, "cuda")
    want = launched(library, case, tensors).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launched(library, case, tensors)
    for _ in range(3):
        tensors[0].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(tensors[0], want)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_operator_matmul_under_compute_sanitizer(matmul, tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    program = [sys.executable, Path(__file__).with_name("matmul_case.py"), matmul, "cuda"]
    command = ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool, *program]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


LAYER_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_against_the_cpu(name, backend, dtype):
    """Whole layers: compiled, composed of Triton's pieces and of references, against the composition on the CPU."""
    layer = LAYERS[name]
    overload, reason = overload_or_reason(layer, backend, "cuda")
    if overload is None:
        pytest.skip(reason)
    for args in layer_samples(name, dtype):
        if layer.stem == "experts":
            args = (*args[:-1], True)  # else rows without expert may hold anything there
        on_gpu = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        got, want = results(layer, overload, on_gpu), results(layer, layer.overloads["reference"], args)
        for a, b in zip(got, want, strict=True):
            assert a.is_cuda and a.shape == b.shape and a.dtype == b.dtype
            scale = b.double().norm().clamp_min(1e-3 * max(b.numel(), 1) ** 0.5)
            assert (a.cpu().double() - b.double()).norm() <= LAYER_TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("name", sorted(TILES))
def test_other_tiles_against_float64(name, dtype):
    """What the tuner may choose besides a launcher's own table."""
    op, _ = implementation(name, "triton")
    for tiles in TILES[name]:
        for args in samples(name, dtype=dtype, **SIZES[-1]):
            check_operator(op, functools.partial(op.triton_function(), tiles=tiles), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_without_tokens(name, backend):
    op, overload = implementation(name, backend)
    for args in samples(name, T=0):
        check_operator(op, overload, args)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_is_bit_reproducible(name, backend):
    op, overload = implementation(name, backend)
    for dtype in (torch.float32, torch.bfloat16):
        for args in samples(name, T=1000, dtype=dtype):
            first = results(op, overload, args)
            for _ in range(3):
                for a, b in zip(first, results(op, overload, args), strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_reads_no_uninitialised_memory(name, backend):
    op, overload = implementation(name, backend)
    for args in samples(name, T=67, dtype=torch.bfloat16):
        with poisoned():
            got = results(op, overload, args)
        assert all(torch.isfinite(t).all() for t in got)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_runs_on_the_current_stream(name, backend):
    """Its inputs are written by a slow kernel on a side stream: a launch on any other stream reads them too early."""
    op, overload = implementation(name, backend)
    args = samples(name, T=512)[0]
    want = results(op, overload, args)
    results(op, overload, args)  # compiled and warm
    late = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        for a, b in zip(late, args, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        got = results(op, overload, late)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), f"{name} ran on another stream than the current one"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_operator_in_a_cuda_graph(name, backend):
    """Captured once and replayed on new inputs: no sync, no allocation outside the pool, no launch that is left out."""
    op, overload = implementation(name, backend)
    first, second = (samples(name, T=33, dtype=torch.bfloat16, seed=seed)[0] for seed in range(2))
    static = copied(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        overload(*copied(static))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = overload(*static)
    schema = op.default._schema.arguments
    for args in (second, first):
        for a, b in zip(static, args, strict=True):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        got = list(out) if isinstance(out, tuple) else [] if out is None else [out]
        got += [a for a, s in zip(static, schema, strict=True)
                if s.alias_info is not None and s.alias_info.is_write and a.is_floating_point()]  # fmt: skip
        for a, b in zip(got, results(op, overload, args), strict=True):
            assert torch.equal(a, b), f"{name}: a replay differs from a call"


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_backends_agree_with_the_default(name):
    """What the dispatcher chooses is bit for bit what explain() says."""
    op = OPERATORS[name]
    backend = spectral_ops.explain(name, torch.ones(1, device="cuda")).backend
    overload = op.overloads.get(backend, op.default)
    for args in samples(name):
        for a, b in zip(results(op, op.default, args), results(op, overload, args), strict=True):
            assert torch.equal(a, b)


# --- dropout: one mask everywhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_is_the_cpus(p, backend):
    """The same seed draws the same mask, bit for bit, on every backend and device."""
    names = ("seeded_dropout", "dropout_lift_", "block_tile_", "dropout_project")
    run = {n: overload_or_reason(OPERATORS[n], backend, "cuda")[0] for n in names}
    if not any(run.values()):
        pytest.skip(f"{backend} has none of {', '.join(names)}")
    for T, k in ((1, 1), (7, 33), (130, 257), (3, 40_000)):
        for seed in (5, 2**61 + 99):
            on_gpu = torch.tensor([seed], device="cuda")
            ones, zeros = torch.ones(T, k, device="cuda"), torch.zeros(T, k, device="cuda")
            masks = {}
            if plain := run["seeded_dropout"]:
                masks["seeded_dropout"] = plain(ones, on_gpu, p)
            if lift := run["dropout_lift_"]:
                masks["dropout_lift_"] = zeros.clone()
                lift(masks["dropout_lift_"], ones[:, :1].contiguous(), ones[:1].contiguous(), on_gpu, p)
            if tile := run["block_tile_"]:
                masks["block_tile_"] = zeros.clone()
                tile(masks["block_tile_"], ones[:, :1].contiguous(), None, on_gpu, p, False)
            if (project := run["dropout_project"]) and k <= 300:
                masks["dropout_project"] = project(ones, torch.eye(k, device="cuda"), on_gpu, p)
            want = philox.keep_mask(T, k, torch.tensor([seed]), p)
            for name, mask in masks.items():
                assert torch.equal((mask != 0).cpu(), want), name


# --- the public functions: the CPU's whole contract, here on whatever the dispatcher chooses and on the references ----


class TestFunctions(Contract):
    device = "cuda"
    families = LOWRANK + DORA + BLOCKSUM + SEGMENTS + EXPERTS

    @pytest.fixture(autouse=True)
    def deterministic(self):
        """References add with float atomics on a GPU unless asked not to; the kernels are deterministic anyway."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_forced_backend(name, backend):
    """Forced, a function runs on that backend to the last operator, or says which one is missing."""
    for dtype in DTYPES:
        problem = FAMILIES[name].build(((130,), 64, 96, 8), dtype, device="cuda")
        try:
            with use_backend(backend):
                check(problem)
        except spectral_ops.BackendUnavailable as error:
            every = OPERATORS | LAYERS
            missing = [n for n in every if f"cannot run {n}: " in str(error)]
            assert missing
            assert overload_or_reason(every[missing[0]], backend, "cuda")[0] is None
            pytest.skip(str(error))


def step(problem, x, dy):
    v = {**problem.inputs, "x": x}
    y = problem.function(v)
    return y, *torch.autograd.grad(y, [v[n] for n in problem.trained()], dy)


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_on_a_side_stream(name):
    problem = FAMILIES[name].build(((256,), 64, 96, 8), torch.bfloat16, device="cuda")
    y = problem.call()
    dy = cotangent(problem, y)
    torch.manual_seed(problem.seed)
    want = [t.clone() for t in step(problem, problem.inputs["x"], dy)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x = torch.zeros_like(problem.inputs["x"])
        late = torch.zeros_like(dy)
        x.copy_(problem.inputs["x"].detach())
        late.copy_(dy)
        torch.manual_seed(problem.seed)
        got = step(problem, x.requires_grad_(), late)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_two_streams_at_once(name):
    """Two streams run the same layer on different x, interleaved; neither sees the other's scratch."""
    problem = FAMILIES[name].build(((512,), 64, 96, 8), torch.bfloat16, device="cuda")
    dy = cotangent(problem, problem.call())
    xs = [randn(*problem.inputs["x"].shape, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(2)]
    want = []
    for x in xs:
        torch.manual_seed(7)
        want.append([t.clone() for t in step(problem, x, dy)])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(10):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.manual_seed(7)
                got.append(step(problem, x, dy))
        torch.cuda.synchronize()
        for ours, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_training_step_in_a_cuda_graph(name):
    """Forward and backward captured; replays follow x, dy, the parameters and (under dropout) the generator."""
    problem = FAMILIES[name].build(((64,), 48, 64, 8), torch.bfloat16, torch.float32, device="cuda")
    x, dy = problem.inputs["x"].detach().clone().requires_grad_(), cotangent(problem, problem.call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(problem, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(problem, x, dy)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(randn(*x.shape))
            dy.copy_(randn(*dy.shape))
            for n in problem.trained():
                if n not in ("x", "base_out"):
                    problem.inputs[n].mul_(1.125)
        graph.replay()
        torch.cuda.synchronize()
        first = [t.clone() for t in out]
        assert all(torch.isfinite(t).all() for t in first)
        if problem.dropout:
            graph.replay()
            torch.cuda.synchronize()
            assert not torch.equal(out[0], first[0]), "every replay uses the mask of the capture"
        else:
            want = step(problem, x, dy)
            for a, b in zip(first, want, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_dropout_graph_replays_follow_manual_seed():
    problem = FAMILIES["lora-dropout"].build(((64,), 48, 64, 8), torch.float32, device="cuda")
    x, dy = problem.inputs["x"], cotangent(problem, problem.call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(problem, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(problem, x, dy)
    outputs = []
    for _ in range(2):
        torch.manual_seed(11)
        graph.replay()
        torch.cuda.synchronize()
        outputs.append(out[0].clone())
    assert torch.equal(*outputs)


def test_no_synchronisation():
    """Forward, backward, cached and uncached norms and dropout never make the host wait."""
    problems = [FAMILIES[n].build(((64,), 48, 64, 8), torch.bfloat16, device="cuda") for n in CALLS]
    dys = [cotangent(p, p.call()) for p in problems]
    v = FAMILIES["dora"].build(((64,), 48, 64, 8), torch.bfloat16, device="cuda").inputs
    cache = NormCache()
    cache.get(v["weight"], v["A"], v["B"], 0.75)
    reference = [n for n in OPERATOR_NAMES if spectral_ops.explain(n, dys[0]).backend == "reference"]
    if reference:
        pytest.skip(f"on their references, which may wait: {', '.join(reference)}")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem, dy in zip(problems, dys, strict=True):
            step(problem, problem.inputs["x"], dy)
        cache.get(v["weight"], v["A"], v["B"], 0.75)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- token_logprobs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_token_logprobs(frozen, dtype):
    """Value and gradients as on the CPU in float64; nothing waits, not even for a target that is out of range."""
    T, k, V = 300, 64, 1003
    hidden, head = randn(T, k, dtype=dtype), 3 * randn(V, k, dtype=dtype, fan=k)
    targets, dlogp = torch.randint(0, V, (T,)), randn(T)
    targets[::7] = -100
    on_gpu = [hidden.cuda().requires_grad_(), head.cuda().requires_grad_(not frozen)]
    leaves = on_gpu[: 2 - frozen]
    wrong = targets.cuda()
    wrong[1] = V
    tokens, dy = targets.cuda(), dlogp.cuda()
    warm_up = spectral_ops.token_logprobs(*on_gpu, tokens, chunk=128)  # compiles
    torch.autograd.grad(warm_up, leaves, dy.to(warm_up.dtype))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logp = spectral_ops.token_logprobs(*on_gpu, tokens, chunk=128)
        grads = torch.autograd.grad(logp, leaves, dy.to(logp.dtype))
        poisoned_logp = spectral_ops.token_logprobs(*on_gpu, wrong, chunk=128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = [t.double().requires_grad_() for t in (hidden, head)]
    want = spectral_ops.token_logprobs(*wide, targets)
    want_grads = torch.autograd.grad(want, wide, dlogp)[: len(leaves)]
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(logp.cpu().double(), want, rtol=0, atol=eps)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert (got.cpu().double() - wanted).norm() <= eps * wanted.norm()
    assert poisoned_logp[1].isnan() and not poisoned_logp[2:].isnan().any()


# --- NormCache --------------------------------------------------------------------------------------------------------


def cached_layer():
    W = randn(512, 256, dtype=torch.bfloat16, device="cuda", fan=256)
    A = torch.nn.Parameter(randn(8, 256, dtype=torch.float32, device="cuda", fan=256))
    B = torch.nn.Parameter(randn(512, 8, dtype=torch.float32, device="cuda"))
    return W, A, B


def agrees(norm, W, A, B):
    return torch.allclose(norm.double(), weight_norm(W, A.detach(), B.detach(), 0.5), rtol=2e-5, atol=0)


def test_norm_is_reused_within_a_step_and_never_beyond():
    W, A, B = cached_layer()
    cache = NormCache()
    cache.get(W, A, B, 0.5).fill_(7)
    if spectral_ops.explain("column_norm_cached_", W).backend != "reference":
        assert (cache.get(W, A, B, 0.5) == 7).all()
    for write in (lambda p: p.data.mul_(1.5), lambda p: p.data.view(-1)[-1].add_(1), lambda p: p.data.neg_()):
        for p in (A, B):
            write(p)
            assert agrees(cache.get(W, A, B, 0.5), W, A, B)
    optimizer = torch.optim.AdamW([A, B], lr=0.1, fused=True)
    for _ in range(3):
        (A.sum() + B.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert agrees(cache.get(W, A, B, 0.5), W, A, B)


def test_norm_on_another_stream_waits_for_nobody():
    """A stream that did not compute the norm must not read it half-written."""
    W, A, B = cached_layer()
    cache = NormCache()
    cache.get(W, A, B, 0.5)
    torch.cuda.synchronize()
    slow, fast = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(5):
        cache.invalidate()
        with torch.cuda.stream(slow):
            torch.cuda._sleep(20_000_000)
            first = cache.get(W, A, B, 0.5)
        with torch.cuda.stream(fast):
            second = cache.get(W, A, B, 0.5).clone()
        fast.synchronize()
        assert agrees(second, W, A, B)
        slow.synchronize()
        assert agrees(first, W, A, B)


def test_norm_from_two_threads():
    W, A, B = cached_layer()
    cache, bad = NormCache(), []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not agrees(cache.get(W, A, B, 0.5).clone(), W, A, B):
                    bad.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    torch.cuda.synchronize()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad


def test_norm_recomputed_in_every_replay():
    W, A, B = cached_layer()
    cache = NormCache()
    cache.get(W, A, B, 0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache.get(W, A, B, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = cache.get(W, A, B, 0.5)
    for _ in range(2):
        A.data.mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert agrees(norm, W, A, B)


@pytest.mark.parametrize("r", [8, 64, 100])
def test_cayley(r):
    """As on the CPU in float64, orthogonal, without waiting for the device; small matrices in one launch each way."""
    X, G = randn(210, r, r, device="cuda").float().requires_grad_(), randn(210, r, r, device="cuda").float()
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            Q = spectral_ops.cayley(X)
            (got,) = torch.autograd.grad(Q, X, G)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    exact = X.detach().cpu().double().requires_grad_()
    want = spectral_ops.cayley(exact)
    (wanted,) = torch.autograd.grad(want, exact, G.cpu().double())
    torch.testing.assert_close(Q.cpu().double(), want, rtol=0, atol=1e-5)
    assert (Q.mT @ Q - torch.eye(r, device="cuda")).abs().max() < 1e-5
    assert (got.cpu().double() - wanted).norm() <= 2e-5 * wanted.norm()
    if r > 64:
        return  # the library's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(spectral_ops.cayley(X), X, G)
        torch.cuda.synchronize()
    launched = [event.key for event in profile.key_averages() if "cayley" in event.key]
    assert sorted(launched) == ["cayley_backward_kernel", "cayley_kernel"], launched


# --- importance: operators over lists of tensors ----------------------------------------------------------------------

ADAPTED = [(5, 21, 34), (1, 7, 3), (17, 1500, 19)] * 9  # 81 tensors: more than one launch takes


def importance_arguments(dtype=torch.float32, sizes=ADAPTED):
    """exp_avg, uncertainty, params, grads."""
    shapes = [s for r, k, d in sizes for s in ((r, k), (d, r), (r, 1))]
    params, grads = ([randn(*s, dtype=dtype, device="cuda") for s in shapes] for _ in range(2))
    wide = accumulate(dtype)
    state = [torch.rand(sum(p.numel() for p in params), device="cuda").to(wide) for _ in range(2)]
    return *state, params, grads


def importance_step(backend, exp_avg, uncertainty, params, grads, count=40):
    """Scores, kept, Ī, Ū and every E after an update and a choice, all of them new tensors."""
    update, prune = (implementation(name, backend)[1] for name in ("importance_update_", "importance_prune_"))
    exp_avg, uncertainty = exp_avg.clone(), uncertainty.clone()
    params = [p.clone() for p in params]
    scores = update(exp_avg, uncertainty, params, grads, [], 0.85, 0.7, True)
    first = [sum(r for r, _, _ in ADAPTED[:i]) for i in range(len(ADAPTED))]
    return [scores, prune(scores, params[2::3], first, count), exp_avg, uncertainty, *params[2::3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_importance_against_float64(backend, dtype):
    args = importance_arguments(dtype)
    got = importance_step(backend, *args)
    wide = [[t.cpu().double() for t in a] if isinstance(a, list) else a.cpu().double() for a in args]
    want = importance_step("reference", *wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().to(b.dtype), b, rtol=1e-5, atol=1e-6)


def test_importance_is_bit_reproducible_on_any_stream():
    """Gradients are written late on a side stream: a launch on any other stream reads them too early."""
    *args, grads = importance_arguments()
    want = importance_step("triton", *args, grads)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(g) for g in grads]
        torch.cuda._sleep(20_000_000)
        for a, b in zip(late, grads, strict=True):
            a.copy_(b)
        got = importance_step("triton", *args, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_importance_takes_nothing_from_the_host():
    """Gradients move when zero_grad sets them to None: no reason to wait, or to upload anything."""
    args = importance_arguments()
    importance_step("triton", *args)  # compiles, and uploads the sizes
    moved = [g.clone() for g in args[3]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            importance_step("triton", *args[:3], moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in profile.events()]
    assert any("moments_kernel" in name for name in names)
    assert not [name for name in names if "HtoD" in name or "DtoH" in name]


def test_importance_in_a_cuda_graph():
    """Replays follow the gradients that were captured, whatever calls with other gradients come between."""
    args = importance_arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        importance_step("triton", *args)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = importance_step("triton", *args)
    for _ in range(3):
        for g in args[3]:
            g.copy_(torch.randn_like(g))
        want = importance_step("triton", *args[:3], [g.clone() for g in args[3]])
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


# --- indices past 2³¹ -------------------------------------------------------------------------------------------------


def enough_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, {free / 2**30:.1f} are free")


TALL = 2**16 + 5  # rows; times WIDE is more than 2³¹ elements
WIDE = 2**15 + 64


def marked(rows: int, columns: int, value=1.0) -> torch.Tensor:
    """bf16 zeros but for the corners and the row where the flat index passes 2³¹."""
    t = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    t[0, 0] = t[-1, -1] = t[2**31 // columns, 2**31 % columns] = value
    return t


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["block_sum", "block_tile_", "lowrank_update_", "lowrank_backward", "seeded_dropout"])
def test_more_than_2_31_elements(name, backend):
    """Sparse inputs whose every number is known by hand; 32-bit indices wrap, and miss or misplace them."""
    op, overload = implementation(name, backend)
    enough_memory(20)
    middle = 2**31 // WIDE
    rows = torch.tensor([0, middle, TALL - 1], device="cuda")
    r = 8
    big = marked(TALL, WIDE)
    if name == "block_sum":
        h = overload(big, r, None, None, 0.0)
        want = torch.zeros_like(h)
        want[0, 0] = want[-1, (WIDE - 1) % r] = want[middle, (2**31 % WIDE) % r] = 1
        assert torch.equal(h, want)
    elif name == "block_tile_":
        s = torch.zeros(TALL, r, dtype=torch.bfloat16, device="cuda")
        s[rows] = torch.arange(1.0, r + 1, device="cuda").bfloat16()
        overload(big, s, None, None, 0.0, False)
        tiled = torch.arange(1.0, r + 1, device="cuda").bfloat16().repeat(WIDE // r + 1)[:WIDE]
        assert all(torch.equal(big[i], tiled) for i in rows.tolist())
        assert big.count_nonzero() == 3 * WIDE
    elif name == "lowrank_update_":
        h = torch.zeros(TALL, r, dtype=torch.bfloat16, device="cuda")
        h[rows] = 1
        B = torch.ones(WIDE, r, dtype=torch.bfloat16, device="cuda")
        before = big[rows].clone()
        overload(big, h, B, 1.0, None, None)
        assert torch.equal(big[rows], before + r)
        assert big.count_nonzero() == 3 * WIDE
    elif name == "lowrank_backward":
        h, B = (torch.ones(n, r, dtype=torch.bfloat16, device="cuda") for n in (TALL, WIDE))
        g = torch.full((WIDE,), 2.0, device="cuda")
        u, dB, db, dyz, gdy = overload(big, h, B, 1.0, g, big, None, True, True, True, False)
        assert torch.equal(u.sum(1).nonzero().squeeze(1), rows)
        columns = torch.tensor(sorted({0, 2**31 % WIDE, WIDE - 1}), device="cuda")
        assert torch.equal(dB.sum(1).nonzero().squeeze(1), columns)
        for t, each in ((u[rows], 2.0), (dB[columns], 2.0), (db[columns], 1.0), (dyz[columns], 1.0)):
            assert (t == each).all()
        assert (db.count_nonzero(), dyz.count_nonzero(), gdy.numel()) == (3, 3, 0)
    else:
        del big
        seed, p = torch.tensor([2**40 + 3], device="cuda"), 0.5
        dropped = overload(torch.ones(TALL, WIDE, dtype=torch.bfloat16, device="cuda"), seed, p)
        first = TALL * WIDE - 4096  # a multiple of 4 elements from the start of a counter
        first -= first % 4
        words = philox.philox(torch.arange(first // 4, (TALL * WIDE + 3) // 4, device="cuda"), seed).flatten()
        want = ((words >> 8).double() * 2.0**-24 >= p)[: TALL * WIDE - first]
        assert torch.equal(dropped.flatten()[first:] != 0, want)


@pytest.mark.parametrize("name", ["lora", "dora", "bone"])
def test_a_layer_with_more_than_2_31_outputs(name):
    """Rows on either side of 2³¹ equal those of the same layer on these rows alone."""
    enough_memory(40)
    k, d, r = 16, WIDE, 4
    problem = FAMILIES[name].build(((8,), k, d, r), torch.bfloat16, device="cuda")
    v = problem.inputs
    x = randn(1, k, dtype=torch.bfloat16, device="cuda").repeat(TALL, 1)
    rows = torch.tensor(
        [0, 1, 2**31 // WIDE - 1, 2**31 // WIDE, 2**31 // WIDE + 1, TALL - 1, TALL - 2, 5], device="cuda"
    )
    few = randn(8, k, dtype=torch.bfloat16, device="cuda")
    x[rows] = few
    x.requires_grad_()
    y = problem.function({**v, "x": x})
    small = few.clone().requires_grad_()
    y_small = problem.function({**v, "x": small})
    torch.testing.assert_close(y[rows], y_small, rtol=2e-2, atol=2e-2)
    dy = torch.zeros_like(y)
    dy_small = randn(8, d, dtype=torch.bfloat16, device="cuda")
    dy[rows] = dy_small
    names = [n for n in problem.trained() if n != "x"]
    got = torch.autograd.grad(y, [x, *(v[n] for n in names)], dy)
    want = torch.autograd.grad(y_small, [small, *(v[n] for n in names)], dy_small)
    torch.testing.assert_close(got[0][rows], want[0], rtol=2e-2, atol=1.0)
    assert got[0].count_nonzero(1).count_nonzero() == 8
    for n, a, b in zip(names, got[1:], want[1:], strict=True):
        scale = b.float().norm() / b.numel() ** 0.5
        torch.testing.assert_close(
            a.float(), b.float(), rtol=3e-2, atol=0.05 * scale.item(), msg=lambda m, n=n: f"d{n}: {m}"
        )


# --- devices ----------------------------------------------------------------------------------------------------------


def test_tensors_on_another_device_are_named():
    x, W = torch.ones(2, 8, device="cuda"), torch.ones(4, 8)
    with pytest.raises(ValueError, match="^weight: got a tensor on cpu, wanted cuda:0 as x"):
        spectral_ops.bone_linear(x, W, torch.ones(2, 4, device="cuda"))


@pytest.mark.parametrize("name", CALLS)
def test_second_gpu(name):
    """A kernel goes to the device of its tensors, not to the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    check(FAMILIES[name].build(((20,), 24, 40, 5), torch.bfloat16, device="cuda:1"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["lora", "dora", "bone"])
def test_compiled(name):
    """torch.compile(fullgraph=True) on the GPU, where inductor generates Triton code around ours."""
    problem = FAMILIES[name].build(((32,), 48, 64, 8), torch.bfloat16, torch.float32, device="cuda")
    names = problem.trained()
    dy = cotangent(problem, problem.call())
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: problem.function(v), fullgraph=True)
    y = compiled(problem.inputs)
    grads = torch.autograd.grad(y, [problem.inputs[n] for n in names], dy)
    want, want_grads = evaluate(problem, dy)
    torch.testing.assert_close(y.double().cpu(), want, rtol=5e-2, atol=5e-2)
    for n, grad in zip(names, grads, strict=True):
        scale = want_grads[n].norm() / want_grads[n].numel() ** 0.5
        torch.testing.assert_close(grad.double().cpu(), want_grads[n], rtol=5e-2, atol=0.1 * scale.item())
