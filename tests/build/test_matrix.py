"""deploy.matrix: what makes a row red, the table of the documentation, and the training step that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import matrix, train_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheel(tmp_path) -> Path:
    """One with both extensions, by its list of files."""
    path = tmp_path / "spectral_ops-1.2-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("spectral_ops-1.2.dist-info/METADATA", "Name: spectral_ops\nRequires-Dist: torch>=2.10.dev0\n")
        for name in ("_C", "_C_cuda"):
            archive.writestr(f"spectral_ops/{name}.abi3.so", "")
    return path


GOOD = "All operators agree with the float64 reference (bounds)."


class Told:
    """An environment that answers as it was told, in the place of a real one."""

    torch, after = "2.14.1+cu130", None  # its version, and the one after the wheel where that is another
    check, info, raises, cuda, package = 0, 0, None, "13.0", "venv/spectral_ops/__init__.py"
    errors = {"_C": None, "_C_cuda": None}
    rows = [{"method": "lora", "dtype": "float32", "failed": None, "difference": 1e-7}]

    def __init__(self, folder: Path, base: str) -> None:
        self.folder, self.installed = folder, []

    def install(self, *arguments) -> None:
        if self.raises:
            raise RuntimeError(self.raises)
        self.installed.append([str(argument) for argument in arguments])
        type(self).last = self.installed

    def version(self, package: str) -> str:
        return (self.after if len(self.installed) > 1 else None) or self.torch

    def run(self, *arguments, check=True) -> subprocess.CompletedProcess:
        text, status = "3.12.1", 0
        if "check" in arguments:
            text, status = GOOD if not self.check else "RED: 2 failed", self.check
        elif "info" in arguments:
            text, status = "the last line", self.info
        elif matrix.TRAIN_STEP in arguments:
            states = {name: {"operators": 57, "error": error} for name, error in self.errors.items()}
            found = {"package": str(self.folder / self.package), "torch": self.torch, "cuda": self.cuda}
            text = json.dumps({**found, "extensions": states, "rows": self.rows})
        return subprocess.CompletedProcess(arguments, status, stdout=f"{text}\n", stderr="")


@pytest.fixture
def told(monkeypatch):
    class Own(Told):
        pass

    monkeypatch.setattr(matrix, "Environment", Own)
    return Own


def test_a_good_row(told, wheel):
    row = matrix.cell(wheel, "python3.12", "2.14.1")
    assert row["red"] == [] and row["supported"] and row["python"] == "3.12.1" and row["torch"] == "2.14.1+cu130"
    assert told.last == [["torch==2.14.1"], [str(wheel)]]
    assert row["difference"] == {"float32": 1e-7} and row["methods"] == 1


@pytest.mark.parametrize(
    ("change", "red"),
    [
        ({"after": "2.15.0"}, "installing the wheel replaced torch 2.14.1+cu130 by 2.15.0"),
        ({"check": 1}, "check: RED: 2 failed"),
        ({"info": 1}, "info: the last line"),
        ({"errors": {"_C": "undefined symbol", "_C_cuda": None}}, "_C: undefined symbol"),
        ({"errors": {"_C": None, "_C_cuda": "libcudart.so.12"}}, "_C_cuda: libcudart.so.12"),
        ({"package": "../elsewhere/__init__.py"}, "training: imported"),
        ({"raises": "pip: no such torch"}, "pip: no such torch"),
        ({"rows": [{"method": "bat", "dtype": "float32", "failed": "is apart"}]}, "training: bat, float32: is apart"),
    ],
)
def test_what_makes_a_row_red(told, wheel, change, red):
    for name, value in change.items():
        setattr(told, name, value)
    if "package" in change:
        told.package = str(wheel)
    assert any(text.startswith(red) for text in matrix.cell(wheel, "python3.12", "2.14.1")["red"])


def test_an_old_torch_gets_the_wheel_alone_and_needs_no_kernels(told, wheel):
    told.torch, told.errors = "2.9.1", {"_C": "wants torch 2.10", "_C_cuda": "wants torch 2.10"}
    row = matrix.cell(wheel, "python3.12", "2.9.1")
    assert row["red"] == [] and not row["supported"]
    assert told.last[1] == ["--no-deps", str(wheel)]
    assert matrix.state(row, "_C") == "refused"


def test_a_torch_of_no_or_another_cuda_needs_no_cuda_kernels(told, wheel):
    told.torch, told.cuda, told.errors = "2.13.0+cpu", None, {"_C": None, "_C_cuda": "no CUDA"}
    row = matrix.cell(wheel, "python3.11", "2.13.0+cpu")
    assert row["red"] == [] and matrix.state(row, "_C_cuda") == "torch has no CUDA"
    told.cuda, told.errors = (
        "12.8",
        {"_C": None, "_C_cuda": "_C_cuda was built for CUDA 13.0, torch 2.10 is for CUDA 12.8"},
    )
    row = matrix.cell(wheel, "python3.11", "2.10.0")
    assert row["red"] == [] and matrix.state(row, "_C_cuda") == "of another CUDA"


def test_results_are_renewed_row_by_row_and_end_red(told, wheel, tmp_path, capsys):
    file = tmp_path / "results" / "matrix.json"
    arguments = [str(wheel), "--python", "a", "--results", str(file), "--torch"]
    assert matrix.main([*arguments, "2.14.1"]) == 0
    told.torch = "2.9.1"
    told.errors = {"_C": "old", "_C_cuda": "old"}
    assert matrix.main([*arguments, "2.9.1"]) == 0
    told.check = 1
    assert matrix.main([*arguments, "2.9.1"]) == 1
    results = json.loads(file.read_text())
    assert [(row["torch"], bool(row["red"])) for row in results["rows"]] == [("2.9.1", True), ("2.14.1+cu130", False)]
    assert "RED: check: RED: 2 failed" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.MARKER}\nold\n<!-- end -->\nafter\n")
    assert matrix.write_table(results, page)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", matrix.MARKER] and lines[-2:] == ["<!-- end -->", "after"]
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}
    assert (
        "torch 2.9.1: old." in lines
        and "| 2.14.1+cu130 | 3.12.1 | 57 operators | 57 operators | ok |" in page.read_text()
    )
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("other", "")
    told.check = 0
    assert matrix.main([*arguments, "2.9.1"]) == 0  # rows of another wheel are dropped
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_every_torch_and_every_python_once():
    assert matrix.pairs(["a", "b"], ["1", "2"], False) == [("a", "1"), ("a", "2"), ("b", "2")]
    assert matrix.pairs(["a", "b"], ["1", "2"], True) == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]


def test_the_table_of_the_documentation_is_that_of_the_results():
    assert not matrix.write_table(matrix.read(matrix.RESULTS), matrix.page_with_table(), write=False), (
        "python -m deploy.matrix --table"
    )


def test_an_environment_runs_its_own_python_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix.shutil, "which", lambda name: None)
    call = matrix.Environment._call
    monkeypatch.setattr(  # pip would take seconds to come in
        matrix.Environment,
        "_call",
        lambda self, *c, **k: call(self, *c, *["--without-pip"] * ("venv" in c), **k),
    )
    there = matrix.Environment(tmp_path, sys.executable)
    code = "import os, sys; print(sys.prefix, os.getcwd(), os.listdir())"
    assert there.run("-c", code).stdout.split() == [str(tmp_path / "venv"), str(tmp_path / "empty"), "[]"]
    with pytest.raises(RuntimeError, match="-c raise SystemExit.*: no$"):
        there.run("-c", "raise SystemExit('no')")


# --- the training step ---


@pytest.mark.parametrize("name", ["lora", "rosa", "bat"])
def test_the_training_step_trains_on_the_kernels_as_on_the_reference(name):
    row = train_step.compare(name, "float32", steps=2)
    assert row["failed"] is None and row["chosen"][1] < row["chosen"][0]


def test_the_training_step_sees_a_wrong_loss_and_one_that_stands_still(monkeypatch):
    losses = iter([[4.0, 3.0], [4.0, 3.1], [4.0, 4.0], [4.0, 4.0], [4.0, float("nan")], [4.0, 3.0]])
    monkeypatch.setattr(train_step, "train", lambda *_: next(losses))
    assert (
        "loss is 3.2e-02 from the reference's, wanted at most 1e-05"
        in train_step.compare("lora", "float32", 2)["failed"]
    )
    assert "wanted it to move" in train_step.compare("lora", "float32", 2)["failed"]
    assert "loss is nan from" in train_step.compare("lora", "float32", 2)["failed"]
    monkeypatch.setattr(train_step, "train", lambda *_: 1 / 0)
    assert train_step.compare("lora", "float32", 2)["failed"] == "ZeroDivisionError: division by zero"
