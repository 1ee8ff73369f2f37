"""Tables of measured choices: what they change, what they leave alone, and the tuner that writes them."""

from __future__ import annotations

import functools
import inspect
import json

import pytest
import torch
from instruments import extension_loaded, extension_waived
from tensors import randn

import spectral_ops
from spectral_ops import _library, backends, cli, explain, tuning, use_backend
from spectral_ops.bench import candidates, judge
from spectral_ops.functional.blocksum import block_sum_op
from spectral_ops.functional.lowrank import lowrank_matmul_op
from spectral_ops.tuning import Class, Entry

CPU = torch.device("cpu")
SOURCE = "a processor, torch 2.13.0, 2026-11-22, commit abc1234"


@pytest.fixture(autouse=True)
def compiled():
    if not extension_loaded() and extension_waived():
        pytest.skip(extension_waived())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables in place of the package's."""
    monkeypatch.setattr(tuning, "FOLDER", str(tmp_path))
    backends.forget_tables()
    yield tmp_path
    backends.forget_tables()


@pytest.fixture
def store(folder):
    """Writes this processor's table: operator -> float32 classes as (arguments, choice)."""

    def write(operators: dict, dtype: str = "float32") -> None:
        table = {
            name: {
                dtype: Entry(SOURCE, tuple(Class(arguments, choice, {choice: 1.0}) for arguments, choice in classes))
            }
            for name, classes in operators.items()
        }
        tuning.file(CPU).write_text(tuning.text(table))
        backends.forget_tables()

    return write


@pytest.fixture
def ran(monkeypatch):
    """Names of the operators whose reference ran."""
    calls = []
    for op in (block_sum_op, lowrank_matmul_op):

        def record(*args, op=op, reference=op.reference):
            calls.append(op.name)
            return reference(*args)

        monkeypatch.setattr(op, "reference", record)
    return calls


MATMUL = (5, 16), (16, 16), (5, 2), (16, 2), None, None, None


def sums(T: int, choice: str) -> tuple:
    return ((T, 16), 4, None, None, None), choice


# --- what a table says ------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(store):
    store({"block_sum": [sums(8, "reference"), sums(1024, "cpu")], "cayley_forward": [(((2, 3, 3),), "reference")]})
    table = tuning.read(tuning.file(CPU))
    assert table["block_sum"]["float32"].source == SOURCE
    assert [one.choice for one in table["block_sum"]["float32"].classes] == ["reference", "cpu"]
    assert table["cayley_forward"]["float32"].classes[0].arguments == ((2, 3, 3),)
    assert tuning.text(table) == tuning.file(CPU).read_text()


@pytest.mark.parametrize(("T", "nearest"), [(0, 1), (1, 1), (43, 1), (46, 1024), (1024, 1024), (10**6, 1024)])
def test_sizes_nobody_measured_take_the_nearest_in_the_logarithm(T, nearest):
    """The middle between 1 and 1024 tokens is the geometric mean of 2 and 1025, less one."""
    entry = Entry(SOURCE, tuple(Class(*sums(n, "cpu"), {}) for n in (1, 1024)))
    assert tuning.nearest(entry, sums(T, "")[0]).arguments[0][0] == nearest


def test_the_same_flags_go_before_near_sizes():
    classes = [(((8, 8), True), "cpu"), (((10**6, 8), False), "reference")]
    entry = Entry(SOURCE, tuple(Class(*one, {}) for one in classes))
    assert tuning.nearest(entry, ((8, 8), False)).choice == "reference"
    assert tuning.nearest(entry, ((10**6, 8), True)).choice == "cpu"


def test_signature_takes_the_narrowest_dtype():
    assert tuning.signature((torch.zeros(2), [torch.zeros(2, dtype=torch.float16)], []))[0] == torch.float16
    wide, half = torch.zeros(3, 2), torch.zeros(4, dtype=torch.bfloat16)
    assert tuning.signature((wide, half, torch.zeros(1, dtype=torch.int8), None, 0.5, 3, True, [wide, wide])) == (
        torch.bfloat16, ((3, 2), (4,), (1,), None, None, 3, True, 2),
    )  # fmt: skip


# --- what it changes --------------------------------------------------------------------------------------------------


def test_a_table_changes_what_runs_and_explain_says_so(store, ran):
    store({"block_sum": [sums(8, "reference"), sums(1024, "cpu")]})
    x = randn(9, 16, dtype=torch.float32)
    want = x.view(9, 4, 4).sum(1)
    torch.testing.assert_close(spectral_ops.block_sum(x, 4), want)
    assert ran == ["block_sum"]
    choice = explain("block_sum", x)
    assert choice.backend == "reference"
    for part in (tuning.file(CPU).name, "8x16", SOURCE):
        assert part in choice.reason
    more = randn(900, 16, dtype=torch.float32)
    spectral_ops.block_sum(more, 4)
    assert ran == ["block_sum"] and explain("block_sum", more).backend == "cpu"
    assert explain("block_sum").backend == "reference or cpu"


def test_another_dtype_and_another_operator_keep_the_default(store, ran):
    store({"block_sum": [sums(8, "reference")]})
    spectral_ops.block_sum(randn(9, 16, dtype=torch.bfloat16), 4)
    assert not ran
    choice = explain("block_sum", torch.zeros(9, 16, dtype=torch.bfloat16))
    assert choice.backend == "cpu" and "default: no measurement for block_sum in bfloat16" in choice.reason
    assert "default: no measurement for block_tile_ in" in explain("block_tile_").reason


def test_a_forced_backend_goes_first(store, ran):
    store({"block_sum": [sums(8, "reference")]})
    with use_backend("cpu"):
        spectral_ops.block_sum(randn(8, 16, dtype=torch.float32), 4)
        assert explain("block_sum", torch.zeros(8, 16)).reason == "forced"
    assert not ran


def test_the_route_of_a_low_rank_layer(store, ran):
    x, W, A, B, b = (randn(*s, dtype=torch.float32) for s in ((5, 12), (9, 12), (2, 12), (9, 2), (9,)))
    A.requires_grad_()
    y = spectral_ops.lowrank_linear(x, W, A, B, b, scale=0.5)
    assert not ran and explain("lowrank_matmul").backend == "library"
    sizes = (5, 12), (9, 12), (5, 2), (9, 2), None, None, (9,)
    store({"lowrank_matmul": [(sizes, "reference")]})
    tuned = spectral_ops.lowrank_linear(x, W, A, B, b, scale=0.5)
    assert ran == ["lowrank_matmul"]
    torch.testing.assert_close(tuned, y)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), A)[0] for out in (tuned, y)))
    assert "lowrank_matmul: reference" in explain("lowrank_linear", x).reason
    store({"lowrank_matmul": [(sizes, "library"), (((9999, 12), *sizes[1:]), "reference")]})
    assert torch.equal(spectral_ops.lowrank_linear(x, W, A, B, b, scale=0.5), y)
    assert ran == ["lowrank_matmul"]


def test_a_choice_that_cannot_run_here_is_the_default_and_says_why(store, ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    store({"block_sum": [sums(8, "triton:short"), sums(1024, "reference")]})
    x = torch.zeros(8, 16)
    spectral_ops.block_sum(x, 4)
    choice = explain("block_sum", x)
    assert choice.backend == "cpu" and not ran
    assert "triton:short" in choice.reason and "cannot run here: " in choice.reason


def test_an_architecture_without_a_table_has_the_defaults(store, ran, monkeypatch):
    store({"block_sum": [sums(8, "reference")]})
    monkeypatch.setattr(tuning, "architecture", lambda device: "cpu-other")
    backends.forget_tables()
    spectral_ops.block_sum(torch.zeros(8, 16), 4)
    assert not ran
    assert explain("block_sum", torch.zeros(8, 16)).reason == "default: no measurement for block_sum in cpu-other.json"


def test_nothing_is_asked_where_there_is_no_table(folder, monkeypatch):
    monkeypatch.setattr(backends, "tuned", lambda *_: pytest.fail("a table was asked for"))
    x, A, B = torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(4, 3)
    spectral_ops.block_sum(x, 4)
    spectral_ops.lowrank_linear(x, torch.zeros(4, 8), A, B)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "version: got None, wanted 1"),
        ('{"version": 2}', "version: got 2, wanted 1"),
        ('{"version": 1}', "operators: got None"),
        ('{"version": 1, "operators": {"block_cum": {}}}', "operator: got 'block_cum'"),
        (
            '{"version": 1, "operators": {"block_sum": {"float32": {"classes": []}}}}',
            "block_sum, float32: not an entry",
        ),
        ('{"version": 1, "operators": {"block_sum": {"float32": {"source": "", "classes": [{}]}}}}', "not an entry"),
        (
            '{"version": 1, "operators": {"block_sum": {"float32": {"source": "", "classes": []}}}}',
            "classes: got \\[\\]",
        ),
    ],
)
def test_a_file_that_is_no_table_is_an_error_that_names_it(folder, content, message):
    tuning.file(CPU).write_text(content)
    backends.forget_tables()
    for _ in range(2):  # and stays one
        with pytest.raises(ValueError, match=message) as raised:
            spectral_ops.block_sum(torch.zeros(8, 16), 4)
        assert str(tuning.file(CPU)) in str(raised.value)
    with pytest.raises(ValueError, match=message):
        explain("block_sum", torch.zeros(8, 16))
    with use_backend("cpu"):
        spectral_ops.block_sum(torch.zeros(8, 16), 4)


def test_an_unknown_choice_is_an_error(store):
    store({"block_sum": [sums(8, "library")]})
    with pytest.raises(ValueError, match="choice: got 'library', wanted one of reference, cpu, triton, cuda, triton:"):
        spectral_ops.block_sum(torch.zeros(8, 16), 4)


@pytest.mark.slow
def test_a_compiled_graph_looks_its_sizes_up_as_it_runs(store, ran):
    """One graph for any number of tokens, whole, in which each call runs what its own sizes choose."""
    few, many = ((8, 16), *MATMUL[1:]), ((1024, 16), *MATMUL[1:])
    store({"lowrank_matmul": [(few, "reference"), (many, "library")]})
    W, A, B = (randn(*s, dtype=torch.float32) for s in ((16, 16), (2, 16), (16, 2)))
    layer = functools.partial(spectral_ops.lowrank_linear, weight=W, lora_A=A, lora_B=B, scale=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T, calls in ((9, 1), (900, 0), (12, 1)):
            x = randn(T, 16, dtype=torch.float32).requires_grad_()
            want = layer(x)
            del ran[:]
            got = compiled(x)
            assert len(ran) == calls, T
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


# --- the tuner --------------------------------------------------------------------------------------------------------

TUNE = ["tune", "--parts", "operators", "--operators", "block_sum", "--dtype", "float32", "--device", "cpu",
        "--tokens", "4", "--shape", "16", "32", "--rank", "4", "--repeats", "5"]  # fmt: skip


@pytest.fixture
def slow_kernel(monkeypatch):
    """A clock by which every call takes a second, those of the default two."""

    def interleave(calls, between, repeats, device):
        for call in calls.values():
            call()
        return {name: [2.0 if name == "cpu" else 1.0] * repeats for name in calls}

    monkeypatch.setattr(candidates, "interleave", interleave)
    monkeypatch.setattr(candidates, "lookup_seconds", lambda: 0.0)


def test_tune_writes_only_when_asked_and_the_table_is_used(folder, slow_kernel, capsys):
    assert cli.main(TUNE) == 0
    assert not list(folder.iterdir()) and explain("block_sum").backend == "cpu"
    printed = capsys.readouterr().out
    assert cli.main([*TUNE, "--write"]) == 0
    assert [path.name for path in folder.iterdir()] == [tuning.file(CPU).name]
    entry = json.loads(tuning.file(CPU).read_text())["operators"]["block_sum"]["float32"]
    assert "commit" in entry["source"] and f"torch {torch.__version__}" in entry["source"]
    assert entry["classes"] and all(set(one["microseconds"]) == {"cpu", "reference"} for one in entry["classes"])
    assert '"choice": "reference"' in printed
    assert explain("block_sum", torch.zeros(4, 32)).backend == "reference"


def test_a_wrong_candidate_is_refused(folder, slow_kernel, monkeypatch, capsys):
    right = backends.implementation

    def implementation(operator, choice):
        call = right(operator, choice)
        return (lambda *args: call(*args) * 1.5) if choice == "reference" else call

    monkeypatch.setattr(backends, "implementation", implementation)
    assert cli.main([*TUNE, "--write"]) == 1
    out = capsys.readouterr().out
    assert "reference RED" in out and "nothing beat the default" in out
    assert not list(folder.iterdir())


def test_a_candidate_whose_runs_differ_is_refused(monkeypatch):
    right = backends.implementation

    def implementation(operator, choice):
        call = right(operator, choice)
        return (lambda *args: call(*args) * (1 + 1e-6 * torch.rand(()))) if choice == "reference" else call

    monkeypatch.setattr(backends, "implementation", implementation)
    args = torch.randn(4, 32), 4, None, None, 0.0
    times, refused = candidates.measure(block_sum_op, args, lambda _: None, 2, 0.0)
    assert list(times) == ["cpu"] and refused == {"reference": "differs between two runs"}


def test_an_interrupted_run_keeps_what_it_measured(folder, slow_kernel, monkeypatch):
    right, calls = candidates.measure, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return right(*args)

    monkeypatch.setattr(candidates, "measure", interrupted)
    assert cli.main([*TUNE, "--write"]) == 0
    assert len(tuning.read(tuning.file(CPU))["block_sum"]["float32"].classes) == 1


def test_the_default_loses_by_more_than_the_noise_only():
    steady = [1.0, 1.01, 0.99, 1.0]
    assert candidates.winner({"cpu": steady, "reference": [0.5] * 4}) == "reference"
    assert candidates.winner({"cpu": steady, "reference": [0.97] * 4}) == "cpu"
    assert candidates.winner({"cpu": [0.8, 1.0, 1.0, 1.2], "reference": [0.5, 0.9, 0.9, 1.1]}) == "cpu"
    assert candidates.winner({"library": steady, "triton": [0.9] * 4, "triton:short": [0.7] * 4}) == "triton:short"


def test_new_measurements_replace_those_of_the_same_operator_and_dtype():
    old, new = Entry("old", ()), Entry("new", ())
    table = {
        "block_sum": {"float32": old, "bfloat16": old},
        "block_tile_": {"float32": old},
        "csr_sddmm": {"float32": old},
    }
    found = {"block_sum": {"float32": []}, "block_tile_": {"float32": []}}
    merged = candidates.merged(table, found, {"block_sum": {"float32": new}})
    assert merged == {"block_sum": {"float32": new, "bfloat16": old}, "csr_sddmm": {"float32": old}}


def test_every_operator_has_its_reference_among_the_candidates():
    for operator in _library.OPERATORS.values():
        names = backends.candidates(operator, "cpu")
        assert "reference" in names and names[0] == backends.default(operator, "cpu").backend
        assert not any(name.startswith(("triton", "cuda")) for name in names)
    assert backends.candidates(lowrank_matmul_op, "cpu") == ["library", "reference"]


def test_a_class_has_the_arguments_of_its_operator(store):
    store({"block_sum": [(((8, 16), 4), "reference")]})
    with pytest.raises(
        ValueError, match=r"arguments: got \(\(8, 16\), 4\), wanted those of block_sum\(Tensor x, int r"
    ):
        spectral_ops.block_sum(torch.zeros(8, 16), 4)


def test_a_real_clock_measures_every_candidate(folder, capsys):
    """Caches are overwritten between calls, and what looking up costs is counted."""
    between, called = candidates.flush(CPU), []
    args = torch.randn(4, 32), 4, None, None, 0.0
    lookup = candidates.lookup_seconds(repeats=5)
    times, refused = candidates.measure(
        block_sum_op, args, lambda name: called.append(name) or between(name), 3, lookup
    )
    assert list(times) == ["cpu", "reference"] and not refused
    assert all(len(t) == 3 and min(t) > 0 for t in times.values()) and min(times["reference"]) > lookup >= 0
    assert called.count("cpu") == called.count("reference") >= 3


def test_errors_of_every_shape_and_nan_are_seen():
    one = torch.ones(3)
    assert judge.largest_error([one, 1.1 * one], [one, one]) == pytest.approx(0.1, rel=1e-5)
    assert judge.largest_error([one * float("nan")], [one]) == judge.largest_error([one[:2]], [one]) == float("inf")


def test_tiles_are_those_that_launchers_take():
    pytest.importorskip("triton", reason="the package triton is not installed")
    from spectral_ops import triton_kernels
    from spectral_ops.triton_kernels import common

    for name, operator in _library.OPERATORS.items():
        if triton_kernels.has(operator.stem, name):
            tiles = triton_kernels.tiles(operator.stem, name)
            parameters = inspect.signature(triton_kernels.launcher(operator.stem, name)).parameters
            assert bool(tiles) == ("tiles" in parameters), name
            assert set(tiles) <= set(common.VARIANTS)
    assert common.varied((64, 128, 16, 8), "short") == (32, 128, 16, 8)
    assert common.varied((64, 16, 16, 8), "narrow") == (64, 16, 16, 8), "products take 16 at least"


def test_a_class_is_of_the_dtype_that_is_computed_in():
    """A weight in FP8 beside an output in bfloat16: it is bfloat16's, of the narrowest of 16 bits and more."""
    narrow, out = torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(4, 4, dtype=torch.bfloat16)
    assert tuning.signature((out, narrow, torch.zeros(1, 1), 4, 4))[0] is torch.bfloat16
    assert tuning.signature((torch.zeros(2), out))[0] is torch.bfloat16
