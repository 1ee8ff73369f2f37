"""`python -m benchmarks.bench_tuners`: a wrong row has no time, and one that does not fit costs no other."""

import json

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import bench_tuners  # noqa: E402

SMALL = ["lokr", "shira", "--tokens", "4", "--features", "64", "--repeats", "1", "--device", "cpu", "--json"]


def test_a_wrong_row_has_no_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_tuners.judge, "largest_error", lambda got, wanted: 0.5)
    assert bench_tuners.main([*SMALL, str(tmp_path / "r.json")]) == 1
    assert capsys.readouterr().out.count("RED: an error of 5.0e-01") == 2
    assert [row.keys() for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [{"name", "error"}] * 2


def test_a_row_out_of_memory_costs_no_other(monkeypatch, tmp_path, capsys):
    measure = bench_tuners.measure

    def fails(name, *rest):
        if name == "lokr":
            raise torch.OutOfMemoryError
        return measure(name, *rest)

    monkeypatch.setattr(bench_tuners, "measure", fails)
    assert bench_tuners.main([*SMALL, str(tmp_path / "r.json")]) == 0
    assert "| lokr | out of memory |" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert first == {"name": "lokr", "failed": "out of memory"} and second["accelerated seconds"] > 0
