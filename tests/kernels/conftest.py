"""The CUDA operators without a GPU: csrc/cuda compiled by the C++ compiler and loaded on cuda_emulator/. And the order
of test_gpu.py's tests."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_ops._library import LAYERS, OPERATORS

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
DTYPES = ("bfloat16", "float32", "float16", "float64")  # the most used first


def place(item) -> tuple[int, int, int]:
    """Where a test of test_gpu.py stands: how products read their operands, results of operators, what else they
    promise, layers, public functions, and what takes gigabytes; there the most used dtypes first, and references, which
    are torch's own kernels, last."""
    name, values = item.originalname, getattr(item, "callspec", None)
    values = [str(v).removeprefix("torch.") for v in values.params.values()] if values else []
    parts = (
        "matmul_reads" in name,
        name == "test_operator_against_float64",
        name.startswith("test_operator"),
        item.cls is None and "2_31" not in name,
        item.cls is not None,
        True,
    )
    dtype = max((DTYPES.index(v) for v in values if v in DTYPES), default=0)
    return parts.index(True), max(dtype - 1, 0), "reference" in values


def pytest_collection_modifyitems(config, items):
    """A first contact with a GPU may be cut off: what tells most runs first. Giants may wait for each other."""
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if "2_31" in item.name:
                item.add_marker(pytest.mark.timeout(0))
    places = [i for i, item in enumerate(items) if item.path.stem == "test_gpu"]
    for i, item in zip(places, sorted((items[i] for i in places), key=place), strict=True):
        items[i] = item


@pytest.fixture(autouse=True)
def one_giant_at_a_time(request, tmp_path_factory):
    """Tests of more than 2³¹ elements would not fit on a GPU beside each other."""
    if "2_31" not in request.node.name or not torch.cuda.is_available():
        yield
        return
    folder = tmp_path_factory.getbasetemp()
    with open((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "giant.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    for home in filter(None, [*homes, "/usr/local/cuda"]):
        if (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def emulation() -> list:
    """The command that compiles for the emulator, up to its sources and output."""
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit")
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-fPIC", "-fno-strict-aliasing", "-isystem", headers]
    return [compiler, *flags, "-DSPECTRAL_OPS_EMULATE", "-I", EMULATOR]


def build_emulator():
    """Compiled and loaded once in a process, whose torch takes the namespace once; this module may be there twice."""
    if "plans" in vars(torch.ops.spectral_ops_emulated):
        return torch.ops.spectral_ops_emulated
    command = emulation()
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "csrc/stems.py", folder], check=True)
    sources = [*ROOT.glob("csrc/cuda/*"), *EMULATOR.iterdir(), *ROOT.glob("csrc/ops/*")]
    sources += [*ROOT.glob("csrc/layers/*"), *ROOT.glob("csrc/*.h"), *folder.glob("*.h"), ROOT / "csrc/cpu/isa.h"]
    newest = max(p.stat().st_mtime for p in sources)
    torch_folder = Path(torch.__file__).parent
    host = ["-DSPECTRAL_OPS_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", torch_folder / "include"]
    host += ["-I", folder, "-I", ROOT / "csrc"]
    jobs, objects = [], []
    for source in [EMULATOR / "library.cpp", *ROOT.glob("csrc/cuda/*.cu")]:
        target = folder / f"{source.stem}.o"
        objects.append(target)
        if target.exists() and target.stat().st_mtime > newest:
            continue
        kind = host if source.suffix == ".cpp" else ["-x", "c++"]
        partial = target.with_suffix(f".{os.getpid()}.o")
        job = [*command, *kind, "-c", source, "-o", partial]
        jobs.append((subprocess.Popen(job, stderr=subprocess.PIPE, text=True), partial, target))
    for job, partial, target in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        partial.replace(target)
    library = folder / "libspectral_ops_emulated.so"
    if jobs or not library.exists():
        partial = folder / f"{os.getpid()}.so"
        link = [command[0], "-shared", "-o", partial, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        subprocess.run(link, check=True, capture_output=True)
        partial.replace(library)
    schemas = torch.library.Library("spectral_ops_emulated", "DEF")
    for operator in (*OPERATORS.values(), *LAYERS.values()):
        schemas.define(operator.schema)
    torch.ops.load_library(str(library))
    torch.ops.spectral_ops_emulated.plans = ctypes.CDLL(str(library))
    torch.ops.spectral_ops_emulated.schemas = schemas  # alive as long as the operators
    return torch.ops.spectral_ops_emulated


@pytest.fixture(scope="module")
def emulated():
    """torch.ops.spectral_ops_emulated: the CUDA operators on CPU tensors."""
    return build_emulator()


@pytest.fixture(scope="session")
def emulator_command():
    return emulation()
