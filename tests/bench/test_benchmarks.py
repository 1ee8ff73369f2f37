"""The regression benchmarks of `make bench` can be collected."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("bench_*.py")))
def test_it_can_be_imported(name):
    assert importlib.import_module(f"benchmarks.{name}")
