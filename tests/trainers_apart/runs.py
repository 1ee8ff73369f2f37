"""One process for each run, because a trainer leaves its patches behind; and what two runs are held to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

HERE = Path(__file__).resolve().parent
SEARCHED = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent / "support", HERE)))
STEPS = 5
TOLD = f"spectral_ops: {tiny.ADAPTED} layers fused, 0 fused over their own base layer, 0 left to PEFT"


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is installed apart, by `make trainers`", allow_module_level=True)


def run(script: str, folder: Path, mode: str, *before: str, **environment: str) -> dict:
    """Trains in a process of its own, ``before`` in front of the script: what Record wrote, and all it printed."""
    done = subprocess.run(
        [sys.executable, *before, HERE / script, folder, mode],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"),
             "PYTHONPATH": SEARCHED, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return {**json.loads((folder / f"{mode}.json").read_text()), "output": done.stdout}


def differences(stock: dict, other: dict) -> list[float]:
    assert len(stock["losses"]) == len(other["losses"]) == STEPS
    return [abs(a - b) / a for a, b in zip(stock["losses"], other["losses"], strict=True)]


def same_training(folder: Path, stock: dict, other: dict, name: str, without: str = "stock", tensors: int = 2):
    """The loss curve of the run without us, and the same adapter file up to rounding."""
    from safetensors.torch import load_file

    assert max(differences(stock, other)) < 1e-5
    assert stock["losses"][-1] < stock["losses"][0]
    one, two = (load_file(folder / mode / "adapter_model.safetensors") for mode in (without, name))
    assert one.keys() == two.keys() and len(one) == tensors * tiny.ADAPTED
    for key, value in one.items():
        assert value.dtype == two[key].dtype
        assert (value - two[key]).norm() < 1e-4 * value.norm(), key
        assert value.norm() > 0  # lora_B starts at zero: it was trained


def all_fused(result: dict) -> None:
    """Every adapted layer was called, and every call ran fused."""
    assert result["counts"]["fused"] == tiny.ADAPTED == sum(result["counts"].values())
    assert result["reasons"] == [] and len(result["calls"]) == tiny.ADAPTED and min(result["calls"]) >= STEPS
