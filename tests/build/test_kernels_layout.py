"""The kernel repository for Hugging Face's loader: it imports under another name, beside the installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import kernels

ROOT = Path(__file__).resolve().parents[2]

# As the loader does it, which need not be installed: an absolute import of the package fails, for it is hidden first.
LOAD = """
import importlib.util, json, sys
from pathlib import Path

sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
variant = Path(sys.argv[1]) / "build/torch-cpu"
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not any(m.partition(".")[0] == "spectral_ops" for m in sys.modules)

import torch

x = torch.arange(6.0).reshape(1, 6)
print(module.block_sum(x, 2).tolist(), module.explain("block_sum", x).backend)
if importlib.util.find_spec("triton"):
    with module.use_backend("triton"):  # in Triton's interpreter
        assert module.block_sum(x, 2).tolist() == [[6.0, 9.0]]
    assert name + ".triton_kernels.blocksum" in sys.modules

sys.path.insert(0, sys.argv[2])
import spectral_ops

print(spectral_ops.block_sum(x, 2).tolist(), hasattr(torch.ops.spectral_ops, "block_sum"))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "spectral-ops"
    assert kernels.main([str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_it_loads_beside_the_installed_package(repository, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LOAD, repository, ROOT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[6.0, 9.0]] reference", "[[6.0, 9.0]] True"]


def test_variants(repository):
    assert sorted(path.name for path in (repository / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    cpu, cuda = (repository / f"build/torch-{backend}" for backend in ("cpu", "cuda"))
    for path in (ROOT / "triton_kernels").glob("*.py"):
        assert (cpu / "triton_kernels" / path.name).read_text() == (cuda / "triton_kernels" / path.name).read_text()
    metadata = [json.loads((variant / "metadata.json").read_text()) for variant in (cpu, cuda)]
    assert [m["backend"]["type"] for m in metadata] == ["cpu", "cuda"] and metadata[0]["id"] != metadata[1]["id"]
    assert not list(repository.rglob("*.so")) and not list(repository.rglob("__pycache__"))


def test_the_loader_takes_it(repository):
    loader = pytest.importorskip("kernels", reason="the package kernels is not installed: pip install kernels")
    code = f"import kernels, pathlib; print(kernels.get_local_kernel(pathlib.Path({str(repository)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("_spectral_ops_"), (loader.__version__, done.stderr)


def test_nothing_is_overwritten_or_left_half(repository, tmp_path, capsys, monkeypatch):
    assert kernels.main([str(repository)]) == 1
    assert "exists, wanted a new folder" in capsys.readouterr().err
    monkeypatch.setitem(kernels.NAMED, "backends.py", ("what is not there", ""))
    assert kernels.main([str(tmp_path / "new")]) == 1
    assert "backends.py: has no what is not there" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_absolute_import_is_refused():
    with pytest.raises(ValueError, match="line 2: imports spectral_ops.core, wanted"):
        kernels.check(Path("a.py"), "import os\nimport spectral_ops.core\n")
    assert kernels.relative("    from spectral_ops.core import x\n", 1) == "    from ..core import x\n"
    assert kernels.relative("from spectral_ops import core\n", 0) == "from . import core\n"
