"""The shared work buffers: bounded, released on request, never two users at once, and out of a compiler's way."""

import threading

import pytest
import torch
from instruments import fresh_python
from problems import FAMILIES, cotangent
from tensors import randn, storage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import spectral_ops
from spectral_ops.core.scratch import VIEWS, Scratch

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(autouse=True)
def _nothing_kept():
    """Bytes held include those of the compiled layers, which other tests have left behind."""
    spectral_ops.scratch.release()


def bat(n: int, dtype=F32, weight: float | None = None) -> torch.Tensor:
    """A Bat layer [n, n], whose W' fills n² elements of the layers' buffer; blocks of 4, as many tokens."""
    W = randn(n, n, dtype=dtype) if weight is None else torch.full((n, n), weight, dtype=dtype)
    return spectral_ops.bat_linear(torch.ones(4, n, dtype=dtype), W, torch.zeros(n // 4, 4, 4, dtype=dtype))


def address(scratch: Scratch, shape=(4, 4), dtype=F32) -> int:
    with scratch.lease(shape, dtype, CPU) as t:
        return t.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5), (), (7,), (0, 4), (4, 0), (2, 3, 4)], ids=str)
def test_a_lease_is_a_plain_tensor(shape, dtype):
    scratch = Scratch()
    with scratch.lease(shape, dtype, CPU) as t:
        assert (tuple(t.shape), t.dtype, t.device) == (shape, dtype, CPU)
        assert t.is_contiguous()
        assert not t.requires_grad
        t.fill_(1)
        assert (t == 1).all()


def test_one_buffer_grows_to_the_largest_lease():
    scratch = Scratch()
    assert scratch.nbytes == 0
    first = address(scratch, (10, 10))
    assert scratch.nbytes == 400
    assert address(scratch, (100,), torch.bfloat16) == first
    assert scratch.nbytes == 400
    address(scratch, (1000,))
    assert scratch.nbytes == 4000
    address(scratch, (10,))
    assert scratch.nbytes == 4000


def test_a_lease_above_the_limit_is_not_kept():
    scratch = Scratch(limit=400)
    with scratch.lease((101,), F32, CPU) as t:
        t.fill_(1)
        assert scratch.nbytes == 0
    with scratch.lease((100,), F32, CPU):
        pass
    assert scratch.nbytes == 400
    with scratch.lease((101,), F32, CPU):
        assert scratch.nbytes == 400


def test_release():
    scratch = Scratch()
    scratch.release()
    with scratch.lease((8,), F32, CPU) as t:
        t.fill_(3)
        scratch.release()
        assert scratch.nbytes == 32, "a leased buffer was given back"
        assert (t == 3).all()
    scratch.release()
    assert scratch.nbytes == 0
    address(scratch)


def test_nested_leases_never_share():
    scratch = Scratch()
    with scratch.lease((8,), F32, CPU) as a, scratch.lease((8,), F32, CPU) as b, scratch.lease((8,), F32, CPU) as c:
        assert len({storage(t) for t in (a, b, c)}) == 3
        for i, t in enumerate((a, b, c)):
            t.fill_(i)
        assert [t[0].item() for t in (a, b, c)] == [0, 1, 2]
    assert scratch.nbytes == 32


def test_a_nested_lease_does_not_end_the_outer_one():
    scratch = Scratch()
    with scratch.lease((8,), F32, CPU) as a:
        with scratch.lease((8,), F32, CPU):
            pass
        with scratch.lease((8,), F32, CPU) as c:
            assert storage(c) != storage(a), "the inner lease's end freed the outer one"


def test_an_exception_ends_a_lease():
    scratch = Scratch()
    first = address(scratch)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), scratch.lease((4, 4), F32, CPU):
            raise ZeroDivisionError
    assert address(scratch) == first
    scratch.release()
    assert scratch.nbytes == 0


def test_an_allocation_that_fails_leaves_it_usable(monkeypatch):
    scratch = Scratch()
    address(scratch)
    real = torch.empty

    def fails(*args, **options):
        if options.get("dtype") == torch.uint8:
            raise torch.OutOfMemoryError("no")
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(torch.OutOfMemoryError), scratch.lease((1000,), F32, CPU):
        pass
    monkeypatch.undo()
    assert scratch.nbytes in (0, 64)
    with scratch.lease((1000,), F32, CPU) as t:
        t.zero_()
    assert scratch.nbytes == 4000


def test_threads_never_share():
    scratch, wrong, barrier = Scratch(), [], threading.Barrier(6)

    def work(mark):
        barrier.wait()
        for i in range(300):
            with scratch.lease((50 + (i * mark) % 13,), F32, CPU) as t:
                t.fill_(mark)
                if i % 50 == 0:
                    scratch.release()
                if not (t == mark).all():
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert scratch.nbytes <= 63 * 4
    scratch.release()
    assert scratch.nbytes == 0


def test_views_are_few_and_of_one_memory():
    scratch = Scratch()
    first = address(scratch, (4000,))
    for n in range(1, 3 * VIEWS):
        assert address(scratch, (n,)) == first
        assert len(scratch._views) <= VIEWS
    scratch.release()
    assert not scratch._views, "a view keeps the memory"


def test_other_devices_keep_nothing():
    scratch = Scratch()
    with torch.device("meta"), scratch.lease((8,), F32, CPU) as t:
        assert t.device == CPU
    scratch.release()
    with scratch.lease((8,), F32, torch.device("meta")) as t:
        assert t.is_meta
    assert scratch.nbytes == 0


def test_inference_mode_leaves_a_buffer_that_trains():
    scratch = Scratch()
    with torch.inference_mode(), scratch.lease((4, 4), F32, CPU) as t:
        t.fill_(1)
    assert not any(t.is_inference() for t in (scratch._memory, *scratch._views.values()))
    with scratch.lease((4, 4), F32, CPU) as t:
        assert not t.is_inference()
        W = torch.ones(4, 4, requires_grad=True)
        (W * t.copy_(torch.ones(4, 4))).sum().backward()
    for name in ("rosa-scatter", "bat", "bat-exact"):
        for dtype in (F32, torch.bfloat16):
            spectral_ops.scratch.release()
            problem = FAMILIES[name].build(((9,), 24, 40, 4), dtype)
            with torch.inference_mode():
                problem.call()
            y = problem.call()
            torch.autograd.grad(y.sum(), [problem.inputs[n] for n in problem.trained()])


def test_a_compiler_gets_memory_of_its_own():
    scratch = Scratch()
    with FakeTensorMode(), scratch.lease((4, 4), F32, CPU) as t:
        assert type(t).__name__ == "FakeTensor"
    assert scratch.nbytes == 0
    seen = []

    def function(x):
        with scratch.lease((4, 4), F32, CPU) as t:
            seen.append(torch.compiler.is_compiling())
            return t.copy_(x) * 2

    compiled = torch.compile(function, backend="eager")
    x = torch.ones(4, 4)
    assert torch.equal(compiled(x), 2 * x)
    if any(seen):
        assert scratch.nbytes == 0


@pytest.mark.parametrize("name", ["bat", "rosa-scatter"])
def test_leases_of_two_layers_under_checkpointing(name):
    """Recomputed forward passes lease the same buffer in between: nothing in it is relied on afterwards."""
    spectral_ops.scratch.release()
    first, second = (FAMILIES[name].build(((20,), 40, 40, 5), torch.float32, bias=None) for _ in range(2))

    def layers(x):
        return second.function({**second.inputs, "x": first.function({**first.inputs, "x": x})})

    x = first.inputs["x"]
    y = layers(x)
    dy = cotangent(first, y)
    trained = [x] + [p.inputs[n] for p in (first, second) for n in p.trained() if n != "x"]
    want = torch.autograd.grad(y, trained, dy)
    got = torch.autograd.grad(checkpoint(layers, x, use_reentrant=False), trained, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert spectral_ops.scratch.nbytes == 40 * 40 * 4


def test_what_a_buffer_held_is_never_read():
    """Poisoned between forward and backward, and before each."""
    for name in ("bat", "bat-exact", "rosa-scatter", "rosa-sparse-only"):
        for dtype in (torch.float32, torch.bfloat16):
            problem = FAMILIES[name].build(((20,), 40, 60, 5), dtype)

            def poison():
                with spectral_ops.scratch.lease((200, 200), torch.float64, CPU) as t:
                    t.fill_(float("nan"))
                bat(200, torch.float64, weight=float("nan"))

            poison()
            y = problem.call()
            poison()
            grads = torch.autograd.grad(y.sum(), [problem.inputs[n] for n in problem.trained()])
            assert torch.isfinite(y).all()
            assert all(torch.isfinite(g).all() for g in grads), name


@pytest.mark.parametrize("name", ["bat", "bat-exact", "rosa-scatter"])
def test_layers_in_threads(name):
    """Backward passes and forward passes of several threads, one scratch: the numbers are those of one thread."""
    problems = [FAMILIES[name].build(((33,), 40, 60, 5), torch.float32) for _ in range(4)]

    def step(problem):
        y = problem.call()
        return [y.detach(), *torch.autograd.grad(y, [problem.inputs[n] for n in problem.trained()], torch.ones_like(y))]

    want, wrong = [step(p) for p in problems], []

    def work(i):
        for _ in range(15):
            if not all(torch.equal(a, b) for a, b in zip(step(problems[i]), want[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- the buffer of the compiled layers -------------------------------------------------------------------------------


def test_the_layers_buffer_is_one_for_all_dtypes_and_does_not_grow():
    for _ in range(3):
        for n, dtype in ((40, F32), (40, torch.bfloat16), (32, torch.float64), (60, torch.float16), (8, F32)):
            bat(n, dtype)
    assert spectral_ops.scratch.nbytes == 32 * 32 * 8
    bat(80)
    assert spectral_ops.scratch.nbytes == 80 * 80 * 4
    spectral_ops.scratch.release()
    assert spectral_ops.scratch.nbytes == 0


def test_an_error_inside_a_layer_ends_its_lease():
    """The product raises while W' is leased: the buffer is free again, so that it can be given back."""
    operator, W, blocks = torch.ops.spectral_ops.bat_linear_forward, randn(40, 40, dtype=F32), torch.zeros(10, 4, 4)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            operator(torch.ones(4, 40), W, blocks, torch.ones(7), False, False)
    bat(40)
    spectral_ops.scratch.release()
    assert spectral_ops.scratch.nbytes == 0


def test_layers_without_elements_lease_nothing():
    for d, k in ((0, 8), (8, 0), (0, 0)):
        x, W = torch.ones(4, k).requires_grad_(), torch.ones(d, k)
        blocks = torch.zeros(d // 4, 4, 4).requires_grad_()
        y = spectral_ops.bat_linear(x, W, blocks)
        assert torch.equal(y, torch.zeros(4, d))
        dx, dB = torch.autograd.grad(y.sum(), [x, blocks])
        assert torch.equal(dx, torch.zeros(4, k)) and torch.equal(dB, torch.zeros_like(blocks))
    assert spectral_ops.scratch.nbytes == 0


def test_releasing_while_layers_run():
    x, W, blocks = randn(33, 40, dtype=F32), randn(40, 40, dtype=F32), randn(10, 4, 4, dtype=F32)
    want, wrong, done = spectral_ops.bat_linear(x, W, blocks), [], threading.Event()

    def work():
        for _ in range(200):
            if not torch.equal(spectral_ops.bat_linear(x, W, blocks), want):
                wrong.append(1)

    def release():
        while not done.is_set():
            spectral_ops.scratch.release()

    workers, releaser = [threading.Thread(target=work) for _ in range(3)], threading.Thread(target=release)
    for t in (*workers, releaser):
        t.start()
    for t in workers:
        t.join()
    done.set()
    releaser.join()
    assert not wrong
    spectral_ops.scratch.release()
    assert spectral_ops.scratch.nbytes == 0


@pytest.mark.parametrize("call", ["bat_linear(x, W, torch.zeros(16, 4, 4))", "hira_linear(x, W, W[:4], W[:, :4])"])
def test_a_forked_process_computes(call):
    """Forked at any moment of another thread's call: the child finds no lock that nobody will open. Bat leases the
    compiled layers' buffer where they are there, HiRA that of Python."""
    done = fresh_python(
        f"""
import os, signal, threading, torch, spectral_ops
torch.set_num_threads(1)
x, W = torch.ones(8, 64), torch.ones(64, 64)
run, stop = lambda: spectral_ops.{call}, threading.Event()
"""
        """
want = run()
def work():
    while not stop.is_set():
        run()
thread = threading.Thread(target=work)
thread.start()
codes = []
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if torch.equal(run(), want) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
thread.join()
print(set(codes))
""",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{0}"
