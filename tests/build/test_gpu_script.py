"""``make gpu`` as far as it goes without a chip, so that the first minute on one is not spent on a typo."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import prebuilt
from spectral_ops import _loader
from spectral_ops.cli import bench

ROOT = Path(__file__).resolve().parents[2]
TRUTH = ["build", "info", "check", "verdict", "memcheck", "racecheck", "test"]
FIGURES = ["kernels", "host", "bench", "experts", "training", "report"]
MOST_FILES = 8  # as the script promises


def run(sections: list[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    if shutil.which("bash") is None:
        pytest.skip("bash is not on PATH")
    env = {name: value for name, value in os.environ.items() if name not in ("OUT", "LIMIT")}
    env |= {"DRY": "1", "PYTHON": sys.executable, "SECTIONS": " ".join(sections)} | environment
    return subprocess.run(["bash", folder / "benchmarks" / "gpu.sh"], capture_output=True, text=True, env=env)


def table(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """Of each section how it ended, and its last line."""
    lines = done.stdout[done.stdout.rindex("section  ") :].splitlines()[1:]
    lines = lines[: lines.index("tests that failed:")] if "tests that failed:" in lines else lines
    return {line.split()[0]: re.split(r" {2,}", line[19:].strip(), maxsplit=1) for line in lines if line}


def returned(out: Path) -> set[str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= MOST_FILES and all(len(path.relative_to(out).parts) <= 2 for path in files)
    return {path.name for path in files}


FEW = ["build", "info", "verdict", "memcheck", "bench", "report"]
EVERY = [*TRUTH, *FIGURES[:-1], "tuners", "report", "tune"]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [FEW, pytest.param(EVERY, marks=pytest.mark.thorough)], ids=["few", "every"])
def test_sections_run_dry(wanted, tmp_path):
    for package in ("peft", "transformers", "matplotlib"):
        pytest.importorskip(package)
    chosen = [name for name in wanted if name != "build" or shutil.which("nvcc")]
    done = run(chosen, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    ended = table(done)
    assert list(ended) == chosen and all(words[0] == "ok" for words in ended.values())
    assert ended["verdict"][1].startswith("0 passed, 0 failed, 0 skipped of ")
    files = {"gpu.log", "tests.txt", "results.json"}
    files |= {f"results-{name}.json" for name in ("training", "kernels", "experts") if name in chosen}
    assert returned(tmp_path) == files | {"extras.tar"}
    with tarfile.open(tmp_path / "extras.tar") as extras:
        kinds = {Path(name).suffix for name in extras.getnames()}
    assert {".png", *([".json"] if "tuners" in chosen else [])} <= kinds
    log = (tmp_path / "gpu.log").read_text()
    assert all(f"== {name}: " in log for name in chosen) and "== bench: " in log


def test_a_section_that_fails_fails_the_run():
    done = run(["info"], PYTHON="false")
    assert done.returncode == 1
    assert "FAILED (1)" in done.stdout


def test_no_section_starts_without_time():
    done = run(["info", "report"], LIMIT="4")
    assert done.returncode == 1
    assert done.stdout.count("NO TIME LEFT") == 2 and "== info" not in done.stdout


def test_an_unknown_section_is_refused():
    done = run(["info", "nonsense"])
    assert done.returncode == 2
    assert "no section nonsense" in done.stderr


def test_every_benchmark_has_options_that_exist():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text().replace("\\\n", " ")
    lines = re.findall(r"-m spectral_ops bench (.*)", script)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = ([word for word in line.replace('"', "").split() if "[@]" not in word] for line in lines)
    assert sum(parser.parse_args(given).device == "cuda" for given in words) >= 2


# --- the script as it runs on a chip, in a folder of its own, with a Python that only writes down what it is asked ----

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *get_device_name*) echo "A Chip" ;;
  *get_device_capability*) echo 9.0a ;;
  *benchmarks.prebuilt*) exit "${PREBUILT:-0}" ;;
  "setup.py build_ext"*) mkdir -p build/cmake ;;
  "-c "*" pytest_timeout") exit 1 ;;
  *--draw*) for ((i = 1; i <= ${DRAWN:-9}; i++)); do touch "${!#}/$i.png"; done ;;
  *--json*) while [ "$1" != --json ]; do shift; done; echo '{}' >"$2" ;;
  "-m pytest"* | "-c "*" xdist") exec "$REAL" "$@" ;;
esac
"""

TESTS = """
import os
import time
import pytest

@pytest.mark.parametrize("what", ["wrong-bfloat16", "hangs-float32", "left-float64"])
def test_operator_against_float64(what):
    assert not what.startswith("wrong"), "bfloat16 is wrong here"
    time.sleep(what.startswith("hangs") and float(os.environ.get("HANG", 0)))
"""


@pytest.fixture
def chip(tmp_path):
    """Runs sections in a copy of the script's surroundings; its ``calls`` are what Python was asked."""
    folder = tmp_path / "checkout"
    copied = ["benchmarks/gpu.sh", "tests/__init__.py", "tests/support/outcomes.py", "pyproject.toml", "CMakeLists.txt"]
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc").mkdir()
    (folder / "csrc" / "kernel.cu").write_text("one")
    (folder / "setup.py").write_text("")
    (folder / "tests" / "kernels").mkdir()
    (folder / "tests" / "kernels" / "test_gpu.py").write_text(TESTS + "\npytestmark = pytest.mark.gpu\n")
    stub, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    out.mkdir()

    def act(*sections, **environment):
        calls.write_text("")
        settings = {"DRY": "", "PYTHON": str(stub), "REAL": sys.executable, "CALLS": str(calls), "OUT": str(out)}
        done = run(sections, folder, **settings | environment)
        act.calls = calls.read_text().splitlines()
        return done

    act.folder, act.out = folder, out
    return act


def compiled(chip) -> bool:
    return any(call.startswith("setup.py build_ext") for call in chip.calls)


def test_what_came_along_prebuilt_is_not_compiled(chip):
    assert chip("build").returncode == 0 and not compiled(chip)


def test_what_does_not_serve_is_compiled_once(chip):
    chip("build", PREBUILT="1")
    assert compiled(chip)
    chip("build")
    assert not compiled(chip), "the sources are those it was compiled of"
    (chip.folder / "csrc" / "kernel.cu").write_text("two")
    chip("build")
    assert compiled(chip), "compiled here, and a source has changed since"


def test_a_failure_is_written_before_its_section_is_cut_off(chip):
    done = chip("verdict", LIMIT="25", HANG="100")
    assert done.returncode == 1
    assert table(done) == {"verdict": ["CUT OFF", "0 passed, 1 failed, 0 skipped of 2 tests"]}
    assert returned(chip.out) == {"gpu.log", "tests.txt", "failures.txt"}
    assert "AssertionError: bfloat16 is wrong here" in (chip.out / "failures.txt").read_text()
    name = "tests/kernels/test_gpu.py::test_operator_against_float64[wrong-bfloat16]"
    assert f"FAILED {name}: AssertionError: bfloat16" in (chip.out / "gpu.log").read_text()
    assert done.stdout.rstrip().rpartition("tests that failed:")[2].split()[2] == f"{name}:"


@pytest.mark.thorough
def test_the_verdict_is_not_repeated(chip):
    ended = table(chip("verdict", "test"))
    assert ended["verdict"] == ["FAILED (1)", "1 passed, 1 failed, 0 skipped of 2 tests"]
    assert ended["test"] == ["ok", "1 passed, 0 failed, 0 skipped of 1 tests"]
    assert table(chip("test"))["test"][1] == "2 passed, 1 failed, 0 skipped of 3 tests"


def test_the_names_of_the_halves(chip):
    assert list(table(chip("truth", LIMIT="1"))) == TRUTH
    assert list(table(chip("figures", LIMIT="1"))) == ["build", *FIGURES]
    assert list(table(chip(LIMIT="1"))) == TRUTH + FIGURES


def test_what_a_whole_run_returns(chip):
    done = chip(*FIGURES)
    assert done.returncode == 0, done.stdout
    names = returned(chip.out)
    stem = next(name for name in names if name.endswith("-kernels.json")).removesuffix("-kernels.json")
    jsons = {f"{stem}{what}.json" for what in ("", "-kernels", "-experts", "-training")}
    assert names == {"gpu.log", "extras.tar", *jsons}
    kept = {path.name for path in (chip.folder / "benchmarks" / "results" / "A-Chip").iterdir()}
    assert {f"{stem}.json", "1.png", "9.png"} < kept
    asked = next(call for call in chip.calls if "bench --device cuda" in call)
    assert "--tokens 8192 2048 512 " in asked


def test_a_run_whose_bench_was_cut_off_early_has_its_report(chip):
    done = chip("bench", "report", DRAWN="0")
    assert done.returncode == 0, done.stdout
    assert any("benchmarks.publish results" in call for call in chip.calls)


# --- what the script stands on ----------------------------------------------------------------------------------------


def test_a_library_with_other_schemas_does_not_serve(monkeypatch):
    extension = _loader.EXTENSIONS["cpu"]
    monkeypatch.setattr(extension, "error", None)
    assert prebuilt.reasons("cpu") == [] and prebuilt.main("cpu") == 0
    monkeypatch.setattr(extension, "error", "was built for operator schemas 0")
    assert prebuilt.reasons("cpu") == ["was built for operator schemas 0"] and prebuilt.main("cpu") == 1


def test_a_kernel_that_does_not_run_does_not_serve(monkeypatch):
    monkeypatch.setattr(_loader.EXTENSIONS["cpu"], "error", None)

    def fails(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(prebuilt._library.OPERATORS["block_sum"], "default", fails)
    assert prebuilt.reasons("cpu") == ["block_sum does not run on cpu: no kernel image is available"]


def outcomes(tmp_path, text: str, *options: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.support.outcomes"]
    command += ["--outcomes", str(tmp_path), *options, str(tmp_path / "test_it.py")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    return done, [re.sub(r" +\d+\.\d+ ", " ", line) for line in (tmp_path / "tests.txt").read_text().splitlines()]


LOSES = """
from tests.support import outcomes

gone = []

def test_before():
    pass

def test_loses_the_gpu():
    outcomes.lost = lambda: True
    gone.append(1)
    assert False, "an illegal memory access"

def test_after():
    assert not gone, "in the same process"

def test_last():
    pass
"""


def test_a_process_that_lost_the_gpu_is_replaced(tmp_path):
    pytest.importorskip("xdist")
    done, lines = outcomes(tmp_path, LOSES, "-n", "1", "--dist", "load", "--maxschedchunk", "1")
    assert lines[0] == "== 4 tests"
    assert sorted(lines[1:]) == [
        "failed test_it.py::test_loses_the_gpu: AssertionError: an illegal memory access",
        "passed test_it.py::test_after",
        "passed test_it.py::test_before",
        "passed test_it.py::test_last",
    ]
    assert "FAILED test_it.py::test_loses_the_gpu" in done.stdout


def test_alone_it_ends(tmp_path):
    done, lines = outcomes(tmp_path, LOSES)
    assert len(lines) == 3 and "the CUDA context is lost" in done.stdout


def test_skips_and_broken_setups_are_outcomes(tmp_path):
    text = """
import pytest

@pytest.fixture
def broken():
    raise ValueError("no")

def test_skipped():
    pytest.skip("not here")

def test_broken(broken):
    pass
"""
    _, lines = outcomes(tmp_path, text)
    assert lines == ["== 2 tests", "skipped test_it.py::test_skipped", "failed test_it.py::test_broken: ValueError: no"]


def test_the_gpu_tests_stand_in_order():
    command = [sys.executable, "-m", "pytest", "tests/kernels/test_gpu.py", "-m", "gpu", "-q", "--collect-only"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    read = [name for name in names if "matmul_reads" in name]
    against = [name for name in names if name.startswith("test_operator_against_float64")]
    whole = [i for i, name in enumerate(names) if name.startswith("TestFunctions")]
    giants = [i for i, name in enumerate(names) if "2_31" in name]
    operators = [i for i, name in enumerate(names) if name.startswith("test_operator")]
    assert len(read) == 10 and names[: len(read) + len(against)] == read + against
    assert operators == list(range(len(operators)))
    assert len(names) == giants[-1] + 1 and whole[-1] < giants[0] and len(giants) == giants[-1] - giants[0] + 1
    assert whole == list(range(whole[0], giants[0]))
    common = [i for i, name in enumerate(against) if "bfloat16" in name or "float32" in name]
    assert common == list(range(len(against) // 2))
    assert [i for i in common if "-reference-" in against[i]] == common[-len(common) // 3 :]
