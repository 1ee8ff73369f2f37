"""``bench`` and ``tune`` at a size that takes a moment."""

import json
import math

import pytest
import torch

from spectral_ops import cli
from spectral_ops.cli import bench, peers, tune
from spectral_ops.functional import routes

SMALL = ["--tokens", "8", "--shape", "32", "48", "--repeats", "2", "--device", "cpu"]


@pytest.mark.parametrize("method", peers.METHODS)
def test_bench_measures_every_method_beside_its_peers(method, tmp_path, capsys):
    pytest.importorskip("peft")
    file = tmp_path / "results.json"
    adapters = ["--adapter-dtype", "float32", "same"]
    assert cli.main(["bench", "--methods", method, "--rank", "4", *SMALL, *adapters, "--json", str(file)]) == 0
    assert "RED" not in capsys.readouterr().out
    rows = json.loads(file.read_text())["measurements"]
    measured = {}
    for row in rows:
        measured.setdefault((row["dtype"], row["adapter_dtype"]), []).append(row["implementation"])
    assert list(measured) == [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
    assert all(names[:2] == ["frozen", peers.OURS] and len(names) >= 3 for names in measured.values())
    assert all(row["milliseconds"] > 0 for row in rows)
    errors = [row["error"] for row in rows if row["implementation"] == peers.OURS]
    assert all(error is not None and error < bench.TOLERANCE[torch.bfloat16] for error in errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [m for m in peers.METHODS if m != "rosa"])
def test_every_layer_of_a_method_has_parameters_of_the_same_dtype(method, dtype):
    pytest.importorskip("peft")
    weight = torch.randn(32, 48, dtype=torch.bfloat16)
    for layer in peers.layers(method, weight, 4, dtype).values():
        assert {p.dtype for p in layer.parameters} == {dtype}


def test_bench_shows_no_time_for_a_wrong_result(monkeypatch, capsys):
    pytest.importorskip("peft")
    right = peers.function_layer

    def wrong(*args):
        layer = right(*args)
        return peers.Layer(lambda x: 1.5 * layer.forward(x), layer.parameters)

    monkeypatch.setattr(peers, "function_layer", wrong)
    assert cli.main(["bench", "--methods", "bat", "--rank", "4", "--dtype", "float32", *SMALL]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if peers.OURS in line)
    assert line.count("RED") == 2


def test_tune_measures_every_rate_and_writes_only_when_asked(monkeypatch, tmp_path, capsys):
    file = tmp_path / "rates.json"
    before = (tune.Path(routes.__file__).parent / "rates.json").read_text()
    file.write_text(before)
    monkeypatch.setattr(routes, "__file__", str(tmp_path / "routes.py"))
    rates = ["tune", "--parts", "rates", "--dtype", "float32", *SMALL]
    assert cli.main(rates) == 0
    assert file.read_text() == before
    out = capsys.readouterr().out
    assert all(route in out for route in (*routes.GRADIENT_ROUTES, "spmm", "scatter"))
    assert cli.main([*rates, "--write"]) == 0
    kept = routes.load(file.read_text())
    assert all(math.isfinite(rate) and rate > 0 for rate in kept["cpu"]["float32"])
    assert kept["cpu"]["bfloat16"] == routes.load(before)["cpu"]["bfloat16"]
    assert kept["cuda"] == routes.load(before)["cuda"]
    assert "commit" in json.loads(file.read_text())["cpu"]["source"]
