"""auto() and SPECTRAL_OPS_ACCELERATE in processes of their own: how they get in, and that others import PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import peft, torch
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), peft.LoraConfig(target_modules=["0"]))
"""
SAY = """
import os, sys
print("argv", sys.argv[1:], "name", __name__, "path", sys.path[0], "file", os.path.basename(sys.argv[0]))
"""
ACCELERATED = 'print("layer", type(model.base_model.model[0]).__name__)\n'
LAZILY = """
import importlib, importlib.metadata, importlib.util, inspect, sys
import spectral_ops
from spectral_ops.integrations.auto import finder
assert "peft" not in sys.modules and sys.meta_path.count(finder) == 1
sys.modules["peft"] = None
try:
    import peft
except ImportError:
    del sys.modules["peft"]  # there is no PEFT, and nobody minds
before = importlib.util.find_spec("peft").loader
assert "spectral_ops" not in type(before).__module__ and "peft" not in sys.modules
assert importlib.metadata.version("peft")
probe = importlib.util.find_spec("peft.tuners.tuners_utils")
tuners = importlib.import_module("peft.tuners.tuners_utils")
assert type(tuners.__loader__) is type(tuners.__spec__.loader) is type(before)
assert "class BaseTuner(" in inspect.getsource(tuners)
assert "spectral_ops" in tuners.BaseTuner.inject_adapter.__code__.co_filename
spectral_ops.auto(False)
assert "spectral_ops" not in tuners.BaseTuner.inject_adapter.__code__.co_filename
assert finder not in sys.meta_path
spectral_ops.auto()
first = tuners.BaseTuner
importlib.reload(tuners)
assert tuners.BaseTuner is not first and hasattr(tuners.BaseTuner.inject_adapter, "__wrapped__")
"""


def run(folder: Path, *command: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "SPECTRAL_OPS_ACCELERATE"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_variable_waits_for_peft(tmp_path):
    (tmp_path / "train.py").write_text(f"{LAZILY}\nprint('done')")
    assert run(tmp_path, "train.py", SPECTRAL_OPS_ACCELERATE="1") == "done\n"


@pytest.mark.slow
def test_run_under_a_launcher(tmp_path):
    """The script never names spectral_ops."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("")
    (tmp_path / "sub" / "train.py").write_text(f"import beside\n{SAY}{TRAIN}{ACCELERATED}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    out = run(tmp_path, *launcher, "-m", "spectral_ops", "run", "--strict", "sub/train.py", "--lr", "-h", "-m", "x")
    folder = os.path.realpath(tmp_path / "sub")
    assert out == f"argv ['--lr', '-h', '-m', 'x'] name __main__ path {folder} file train.py\nlayer FusedLoraLinear\n"


def test_run_of_a_module(tmp_path):
    """DeepSpeed's launcher puts its --local_rank before everything of the script's."""
    (tmp_path / "train.py").write_text(SAY + 'print(os.environ["SPECTRAL_OPS_ACCELERATE"])\nraise SystemExit(0)')
    out = run(tmp_path, "-m", "spectral_ops", "--local_rank=0", "run", "-m", "train", "--strict", "a")
    folder = os.path.realpath(tmp_path)
    assert out == f"argv ['--local_rank=0', '--strict', 'a'] name __main__ path {folder} file train.py\n1\n"


@pytest.mark.slow
def test_the_line_for_a_sitecustomize(tmp_path):
    """It is the line that docs/USE.md gives, and works in a script that never names spectral_ops."""
    line = 'import os; os.environ.get("SPECTRAL_OPS_ACCELERATE") and __import__("spectral_ops")'
    assert line in (ROOT / "docs" / "USE.md").read_text()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(line)
    (tmp_path / "train.py").write_text(TRAIN + ACCELERATED)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    assert run(tmp_path, "train.py", PYTHONPATH=path, SPECTRAL_OPS_ACCELERATE="1") == "layer FusedLoraLinear\n"
