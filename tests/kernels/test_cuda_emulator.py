"""The emulator's own rules for Hopper: a tile is copied right, and every broken rule is noticed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(emulator_command, tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rules"
    subprocess.run([*emulator_command, "-I", ROOT / "csrc", EMULATOR / "rules.cpp", "-o", path], check=True)
    return path


@pytest.mark.parametrize("order", "0123")
@pytest.mark.parametrize("broken", range(16))
def test_a_broken_rule_is_noticed(program, broken, order):
    done = subprocess.run([program, str(broken)], env=os.environ | {"EMULATOR_ORDER": order}, capture_output=True)
    assert (done.returncode == 0) == (broken == 0), done.stderr
