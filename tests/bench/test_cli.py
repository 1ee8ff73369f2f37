"""``bench`` and ``tune`` at a size that takes a moment."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops import _loader, cli
from spectral_ops.bench import clock, judge, layers, methods, operators, peers, results, tables
from spectral_ops.bench.counting import counted, peak_bytes
from spectral_ops.cli import bench, check, info, tune
from spectral_ops.functional import rosa_routes

TINY = ["--tokens", "8", "--shape", "32", "48", "--repeats", "2", "--device", "cpu"]
SMALL = [*TINY, "--rank", "4"]
CEILING = results.Ceiling(1e11, 1e10)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Assumed, for measuring them takes seconds; they have a test of their own."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, dtypes: dict.fromkeys(dtypes, CEILING))


def run(*arguments: str, file) -> tuple[int, results.Results]:
    status = cli.main(["bench", *arguments, *SMALL, "--json", str(file)])
    return status, results.read(file)


def is_measured(row) -> bool:
    """Whether every figure of a row is there, finite, and of the sign it must have."""
    positive = [row.seconds, *row.times, row.of_floor, row.floor_seconds, row.bytes]
    return all(math.isfinite(v) and v > 0 for v in positive) and row.flops >= 0 and len(row.times) == 2


@pytest.mark.parametrize("method", peers.METHODS)
def test_every_method_beside_its_peers(method, tmp_path, capsys):
    pytest.importorskip("peft")
    status, found = run("--methods", method, "--adapter-dtype", "float32", "same", file=tmp_path / "r.json")
    out = capsys.readouterr().out
    assert status == 0 and "RED" not in out and "FAILED" not in out and "torch's counter says" not in out
    assert not found.operators
    by_dtype = {}
    for row in found.layers:
        by_dtype.setdefault((row.dtype, row.adapter_dtype), {})[row.implementation] = row
    assert list(by_dtype) == [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
    for rows in by_dtype.values():
        assert list(rows)[:2] == ["frozen", peers.OURS] and list(rows)[-1] == "autograd"
        assert ("PEFT" in rows) == (method in peers.PEFT)
        for name, row in rows.items():
            assert is_measured(row) and row.ratio > 0 and row.flops > 0
            assert row.saved_bytes >= 0 and row.peak_bytes > row.saved_bytes
            assert (row.error is None) == (name == "frozen")
        assert rows["frozen"].ratios == [1.0, 1.0] and rows["frozen"].saved_bytes == 0
        assert rows[peers.OURS].flops > rows["frozen"].flops


def test_every_operator_beside_torch_sparse(tmp_path, capsys):
    status, found = run("--ops", "all", file=tmp_path / "r.json")
    out = capsys.readouterr().out
    assert status == 0 and "RED" not in out and not found.layers
    assert {(row.operator, row.dtype) for row in found.operators} == {
        (name, dtype) for name in operators.NAMES for dtype in methods.DTYPES
    }
    assert all(is_measured(row) and row.error < 1e-2 for row in found.operators)
    beside = {row.operator for row in found.operators if row.backend == "torch.sparse"}
    assert beside == {"csr_spmm_", "csr_sddmm"}
    for column in ("us", "GFLOP", "MB", "GB/s", "TFLOP/s", "% of floor", "error"):
        assert column in out


def test_columns_of_the_layers(capsys):
    assert cli.main(["bench", "--methods", "bone", "--dtype", "float32", "--no-peers", *SMALL]) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("method"))
    for column in ("ms/step", "x frozen", *tables.RATES, "saved MiB", "peak MiB", "error"):
        assert column in header
    assert [line.split()[5] for line in out.splitlines() if line.startswith("bone")][-2:] == ["frozen", peers.OURS]
    assert "ceilings measured in this run" in out and "[1/1] bone float32" in out


def test_missing_kernels_are_named(monkeypatch, capsys):
    monkeypatch.setattr(_loader.EXTENSIONS["cpu"], "error", "it was not built")
    assert cli.main(["bench", "--methods", "bone", "--dtype", "float32", "--no-peers", *SMALL]) == 0
    assert "it was not built" in capsys.readouterr().out.splitlines()[0]


def test_absent_packages_are_named_and_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    status, found = run("--methods", "lora", "--dtype", "float32", file=tmp_path / "r.json")
    assert status == 0
    assert "not installed: peft, unsloth, axolotl, LyCORIS, Liger, spops" in capsys.readouterr().out
    assert [row.implementation for row in found.layers] == ["frozen", peers.OURS, "autograd"]


def test_a_peer_that_raises_is_named_and_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers.Subject, "plain", lambda self: peers.Layer(lambda x: 1 / 0, []))
    status, found = run("--methods", "bone", "--dtype", "float32", file=tmp_path / "r.json")
    assert status == 0 and "autograd" not in {row.implementation for row in found.layers}
    assert "autograd left out of bone: ZeroDivisionError" in capsys.readouterr().out


def test_no_time_beside_a_wrong_layer(monkeypatch, tmp_path, capsys):
    right = layers._in_wider
    monkeypatch.setattr(layers, "_in_wider", lambda *args: [1.5 * t for t in right(*args)])
    status, found = run("--methods", "bat", "--dtype", "float32", file=tmp_path / "r.json")
    assert status == 1 and found.red
    frozen, *others = found.layers
    assert not frozen.red and frozen.times
    assert others and all(row.red and not row.times and not row.ratios and row.ratio is None for row in others)
    lines = [line for line in capsys.readouterr().out.splitlines() if f" {peers.OURS} " in line]
    assert len(lines) == 1 and lines[0].count("RED") == 5


def test_no_time_beside_a_wrong_operator(monkeypatch, tmp_path, capsys):
    right = judge.converted  # the reference's arguments are those that are converted to a dtype
    monkeypatch.setattr(judge, "converted", lambda args, *to: right((2 * args[0], *args[1:]) if to else args, *to))
    status, found = run("--ops", "block_sum", "--dtype", "float32", file=tmp_path / "r.json")
    assert status == 1 and [(row.red, row.times) for row in found.operators] == [(True, [])]
    assert capsys.readouterr().out.count("RED") == 4


def test_control_c_keeps_what_is_measured(monkeypatch, tmp_path, capsys):
    right, calls = layers.measure, []

    def interrupted(method, *args, **options):
        calls.append(method)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(method, *args, **options)

    monkeypatch.setattr(layers, "measure", interrupted)
    status, found = run("--methods", "lora", "bone", "dora", "--dtype", "float32", "--no-peers", file=tmp_path / "r")
    assert status == 130 and calls == ["lora", "bone"]
    assert [row.method for row in found.layers] == ["lora", "lora"]
    out = capsys.readouterr().out
    assert "interrupted" in out and f" {peers.OURS} " in out


def test_a_size_that_does_not_fit_fails_alone(tmp_path, capsys):
    arguments = ["bench", "--methods", "bat", "lora", "--dtype", "float32", "--no-peers", *TINY]
    file = tmp_path / "r.json"
    assert cli.main([*arguments, "--rank", "5", "--json", str(file)]) == 1
    assert {row.method for row in results.read(file).layers} == {"lora"}
    assert "FAILED bat float32" in capsys.readouterr().out


def test_nothing_is_measured_for_a_file_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(SystemExit, match="--json: got .*wanted a file in a directory that exists"):
        cli.main(["bench", "--methods", "lora", *SMALL, "--json", str(tmp_path / "absent" / "r.json")])
    assert "measuring" not in capsys.readouterr().out


def test_defaults_and_selections(tmp_path):
    def chosen(*given):
        parser = bench.argparse.ArgumentParser()
        bench.add_arguments(parser)
        arguments = parser.parse_args(given)
        bench.settle(arguments)
        return arguments

    assert chosen().methods == list(peers.USUAL) and chosen().ops == operators.NAMES
    assert chosen("--methods", "all").methods == list(peers.METHODS) and chosen("--methods", "all").ops == []
    assert chosen("--ops", "column_norm").methods == []
    both = chosen("--ops", "none", "--methods", "vera", "--quick", "--tokens", "7")
    assert (both.ops, both.methods, both.tokens, both.repeats) == ([], ["vera"], [7], bench.QUICK["repeats"])


def test_a_block_s_sizes_and_its_tax(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(methods.BLOCKS, "smollm2", {(16, 16): 3, (8, 16): 1})
    arguments = ("--methods", "lora", "--dtype", "float32", "--shapes", "smollm2")
    status, found = run(*arguments, file=tmp_path / "r.json")
    assert status == 0
    assert {(row.out_features, row.in_features) for row in found.layers} == {(16, 16), (8, 16)}
    ours = [row for row in found.layers if row.implementation in ("frozen", peers.OURS)]
    sizes = {row.out_features: [r for r in ours if r.out_features == row.out_features] for row in ours}
    weight = {d: count * sizes[d][0].seconds for (d, _), count in methods.BLOCKS["smollm2"].items()}
    wanted = sum(weight[d] * sizes[d][1].ratio for d in weight) / sum(weight.values())
    assert tables.block_ratio(ours, methods.BLOCKS["smollm2"]) == pytest.approx(wanted)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("smollm2") and peers.OURS in line)
    saved = 3 * sizes[16][1].saved_bytes + sizes[8][1].saved_bytes
    assert line.split()[-2:] == [f"{wanted:.3f}", f"{saved / 2**20:.2f}"]
    assert tables.block_ratio(ours[:2], methods.BLOCKS["smollm2"]) is None
    ours[1].red, ours[1].times = True, []
    assert tables.block_ratio(ours, methods.BLOCKS["smollm2"]) is None


@pytest.mark.parametrize("method", peers.METHODS)
def test_flops_agree_with_torch_s_counter(method):
    """With its count of our operators, and with its count of the formula's products in plain torch."""
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(s, generator=generator) for s in ((64, 192), (64, 128), (128, 192)))
    x.requires_grad_()
    subject = peers.Subject(method, weight, 8)
    with counted() as counts, FlopCounterMode(display=False) as counter:
        layers.step(subject.ours, x, dy)
    assert counts.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as plain:
        layers.step(subject.plain(), x, dy)
    ratio = counts.flops / plain.get_total_flops()
    if method in ("bat_row", "rosa"):  # no product of the weight's size for what is trained
        assert 0.6 < ratio < 0.8
    elif method == "svft":  # a sparse product in place of the small dense one
        assert 0.98 < ratio < 1
    else:  # torch's counter has no additions outside products
        assert 1 <= ratio < 1.1


def test_ceilings_are_rates():
    found = clock.measure_ceilings("cpu", methods.DTYPES, repeats=2, sizes=(64, 128))
    assert list(found) == list(methods.DTYPES)
    for ceiling in found.values():
        assert 0 < ceiling.flops_per_second < math.inf and 0 < ceiling.bytes_per_second < math.inf


@pytest.mark.parametrize("rate, sizes", [(1e7, [16]), (2e8, [16, 128]), (1e15, [16, 128, 256])])
def test_a_slow_library_is_not_asked_for_large_products(monkeypatch, rate, sizes):
    """A CPU without instructions for bfloat16 takes minutes for the largest."""
    asked = []

    def repeat(call, repeats, device):
        n = call.__defaults__[0].shape[0]
        asked.append(n)
        return [2 * n**3 / rate] * repeats

    monkeypatch.setattr(clock, "repeat", repeat)
    found = clock.product_rate(torch.bfloat16, torch.device("cpu"), sizes=(16, 128, 256), limit=1.0)
    assert found == pytest.approx(rate)
    assert asked == sizes


def test_peak_of_a_frozen_layer_is_what_its_step_allocates():
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(16, 24)
    dy = torch.randn(5, 16)
    layer = peers.Layer(lambda x: torch.nn.functional.linear(x, weight), [])
    assert peak_bytes(lambda: layers.step(layer, x, dy), x.device) == 4 * (5 * 16 + 5 * 24)


def test_overhead_by_tokens(tmp_path, capsys):
    status, found = run("--ops", "none", "--methods", "bone", "--dtype", "float32", "--no-peers", "--overhead",
                        "--quick", file=tmp_path / "r.json")  # fmt: skip
    assert status == 0 and {row.tokens for row in found.overhead} == {1, 128}
    assert {"frozen", peers.OURS} == {row.implementation for row in found.overhead}
    assert all(time > 0 for row in found.overhead for time in row.times)
    assert "us at T=128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("no", "not JSON"),
        ("[]", "format: got None, wanted 1"),
        ('{"format": 2}', "format: got 2, wanted 1"),
        ('{"format": 1, "measurements": []}', "sections: got ['measurements']"),
        ('{"format": 1, "overhead": [{"name": "lora"}]}', "overhead[0]: missing or unknown"),
        ('{"format": 1, "layers": {}}', "layers: got dict"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text, wrong, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        results.read(file)
    assert wrong in str(raised.value) and str(file) in str(raised.value)


def test_results_survive_their_file(tmp_path):
    row = results.Training(
        model="smollm2", method="lora", implementation="peft", compiled=True, checkpointing=False, dtype="float32",
        batch=1, length=2, blocks=3, times=[1.0, 2.5], tokens_per_second=2.0, peak_bytes=None, loss=3.0, error=0.1,
    )  # fmt: skip
    found = results.Results(results.meta("cpu"), {"float32": CEILING}, training=[row])
    results.write(tmp_path / "r.json", found)
    assert results.read(tmp_path / "r.json") == found
    assert "layers" not in json.loads((tmp_path / "r.json").read_text())


def test_tune_measures_every_rate_and_writes_only_when_asked(monkeypatch, tmp_path, capsys):
    file = tmp_path / "rates.json"
    before = (tune.Path(rosa_routes.__file__).parent / "rates.json").read_text()
    file.write_text(before)
    monkeypatch.setattr(rosa_routes, "__file__", str(tmp_path / "rosa_routes.py"))
    rates = ["tune", "--parts", "rates", "--dtype", "float32", *TINY]
    assert cli.main(rates) == 0
    assert file.read_text() == before
    out = capsys.readouterr().out
    assert all(route in out for route in (*rosa_routes.GRADIENT_ROUTES, "spmm", "scatter"))
    assert cli.main([*rates, "--write"]) == 0
    kept = rosa_routes.load(file.read_text())
    assert all(math.isfinite(rate) and rate > 0 for rate in kept["cpu"]["float32"])
    assert kept["cpu"]["bfloat16"] == rosa_routes.load(before)["cpu"]["bfloat16"]
    assert kept["cuda"] == rosa_routes.load(before)["cuda"]
    assert "commit" in json.loads(file.read_text())["cpu"]["source"]


def test_spops_and_liger_get_what_they_document(monkeypatch):
    """Stand-ins with those packages' signatures; the real ones were not at hand."""

    def dense(values, offsets, columns, shape):
        assert offsets.dtype == torch.int32 and columns.dtype == torch.int16
        out = torch.zeros(shape, dtype=values.dtype)
        rows = torch.repeat_interleave(torch.arange(shape[0]), offsets.diff().long())
        return out.index_put((rows, columns.long()), values)

    def spmm(values, offsets, order, columns, B, M):
        assert B.is_contiguous() and (offsets.diff()[order.long()].diff() <= 0).all()
        return dense(values, offsets, columns, (M, len(B))) @ B

    def sddmm(offsets, order, columns, A, BT):
        assert A.is_contiguous() and BT.is_contiguous() and (offsets.diff()[order.long()].diff() <= 0).all()
        ones = dense(torch.ones(len(columns)), offsets, columns, (len(A), len(BT)))
        return (A @ BT.t())[ones != 0]

    def cross_entropy(input, target, ignore_index, reduction):
        return torch.nn.functional.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)

    monkeypatch.setitem(sys.modules, "spops", SimpleNamespace(spmm=spmm, sddmm=sddmm))
    liger = SimpleNamespace(liger_cross_entropy=cross_entropy)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    kinds = {"csr_spmm_": operators._spops, "csr_sddmm": operators._spops, "target_logprob": operators._liger}
    for name, build in kinds.items():
        args = next(operators.arguments(name, 12, 40, 56, 4, torch.float32, "cpu", density=0.1))
        wanted = operators._expected(operators._library.OPERATORS[name], args)
        assert judge.largest_error([build(name, args)()], wanted) < 1e-5


@pytest.mark.parametrize("package", peers.EXTERNAL)
def test_other_packages_kernels_get_peft_s_layer(package, monkeypatch):
    """As apply_lora_o of unsloth and axolotl takes it: an owner of o_proj, and x [batch, length, k]."""
    pytest.importorskip("peft")

    def apply_lora_o(owner, X):
        assert X.dim() == 3 and owner.training
        layer = owner.o_proj
        A, B = layer.lora_A[layer.active_adapters[0]].weight, layer.lora_B[layer.active_adapters[0]].weight
        return X @ layer.base_layer.weight.t() + layer.scaling["default"] * (X @ A.t() @ B.t())

    module = {"unsloth": "unsloth.kernels.fast_lora", "axolotl": "axolotl.kernels.lora"}[package]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(apply_lora_o=apply_lora_o))
    monkeypatch.setattr(peers.importlib, "import_module", sys.modules.__getitem__)
    x, dy = torch.randn(8, 48, requires_grad=True), torch.randn(8, 32)
    subject = peers.Subject("lora", torch.randn(32, 48), 4)
    wanted = layers.step(subject.plain(), x, dy)
    assert judge.largest_error(layers.step(subject.external(package), x, dy), wanted) < 1e-5


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", peers.LYCORIS)
def test_lycoris_computes_the_method(method, adapters):
    """Its own torch code here; on a GPU its Triton kernels take the same call, and the same check."""
    pytest.importorskip("lycoris")
    x, dy = torch.randn(8, 48).bfloat16().requires_grad_(), torch.randn(8, 32).bfloat16()
    subject = peers.Subject(method, torch.randn(32, 48).bfloat16(), 4, adapters)
    error = judge.largest_error(layers.step(subject.lycoris(), x, dy), layers._in_wider(subject, x, dy))
    assert error < judge.LAYER[torch.bfloat16] / 4


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "bone"])
def test_lycoris_stands_beside_lora_on_a_gpu(method, monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda: [name for name in peers.PACKAGES if name != "LyCORIS"])
    subject = peers.Subject(method, torch.randn(32, 48), 4)
    assert "LyCORIS" not in subject.peers()
    subject.weight = SimpleNamespace(is_cuda=True)
    assert ("LyCORIS" in subject.peers()) == (method in peers.LYCORIS)


def test_an_old_lycoris_has_no_kernels(monkeypatch):
    old = SimpleNamespace(bypass_forward_diff=lambda x, org_out, *weights, gamma=1.0, extra_args={}: None)  # noqa: B006
    monkeypatch.setitem(sys.modules, "lycoris.functional.locon", old)
    monkeypatch.setattr(peers.importlib, "import_module", sys.modules.__getitem__)
    with pytest.raises(RuntimeError, match="older than 4.0"):
        peers.Subject("lora", torch.randn(32, 48), 4).lycoris()


def test_check_says_at_once_what_is_red(monkeypatch, capsys):
    """A kernel that raises is red too, and the operators after it are still checked."""

    def error(operator, args, device):
        if operator.name == "block_sum":
            raise RuntimeError("an illegal memory access\nand more")
        return 0.0

    monkeypatch.setattr(check, "relative_error", error)
    assert cli.main(["check", "--operators", "block_sum", "csr_sddmm", "--backends", "reference", "--verbose"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("block_sum raised on cpu, reference: an illegal memory access\n")
    assert "RED: block_sum on cpu, reference: nan! nan! nan! nan!\n" in out and "RED: 1 failed" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("cpu ")] == ["RED", "ok"]


def test_check_takes_the_first_samples(monkeypatch):
    taken = []
    monkeypatch.setattr(check, "relative_error", lambda operator, args, device: taken.append(args) or 0.0)
    for chosen, count in (([], 7), (["--samples", "2"], 2)):
        taken.clear()
        assert cli.main(["check", "--operators", "block_sum", "--backends", "reference", *chosen]) == 0
        assert len(taken) == count * len(judge.BOUNDS) * len(info.devices())
