"""The Triton kernels in Triton's interpreter, against the float64 references (the cases are in triton_cases.py).

triton reads TRITON_INTERPRET where a kernel is decorated, so the cases run in a process that sets it first; one such
process serves the whole module, and every case is a test of its own here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_cases

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (pip install triton)"
)


@pytest.fixture(scope="module")
def interpreter():
    here = Path(__file__).resolve().parent
    env = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        [sys.executable, str(here / "triton_cases.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.thorough] * (n in triton_cases.THOROUGH)) for n in triton_cases.CASES],
)
def test_interpreted(interpreter, name):
    interpreter.stdin.write(name + "\n")
    interpreter.stdin.flush()
    reply = interpreter.stdout.readline()
    assert reply, f"the interpreter's process ended with {interpreter.poll()}: its output is above"
    failure = json.loads(reply)
    if failure:
        pytest.fail(failure, pytrace=False)
