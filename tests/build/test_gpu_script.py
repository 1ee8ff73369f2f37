"""``make gpu`` as far as it goes without a chip, so that the first minute on one is not spent on a typo."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_ops.cli import bench

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ["build", "info", "test", "memcheck", "racecheck", "tune", "bench", "training", "report"]


def run(sections: list[str], **environment: str) -> subprocess.CompletedProcess:
    if shutil.which("bash") is None:
        pytest.skip("bash is not on PATH")
    env = os.environ | {"DRY": "1", "PYTHON": sys.executable, "SECTIONS": " ".join(sections)} | environment
    return subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_every_section_runs_dry():
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    chosen = [name for name in SECTIONS if name != "build" or shutil.which("nvcc")]
    done = run(chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    table = done.stdout[done.stdout.rindex("section ") :].splitlines()[1:]
    assert [line.split()[0] for line in table] == chosen
    assert all(line.split()[3] == "ok" for line in table)


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
