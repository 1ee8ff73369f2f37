"""What cannot be loaded: each says in one line what is wrong and what to do, and the reference serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectral_ops import _library, _loader, backends, tuning
from spectral_ops.cli import info

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "spectral_ops/_C.abi3.so"
needs_build = pytest.mark.skipif(not BUILT.is_file(), reason="_C is not built: there is no file to break")
CUDA_INFO = "nvcc 13.0, driver >= 580, GNU 12.2.0, 8.0|8.6|8.9|9.0a|10.0f|12.0+PTX, torch 2.13.0"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0f", "12.0+PTX")


@pytest.fixture(autouse=True)
def extensions(monkeypatch):
    """The loader with extensions of the test's own; nothing of this process' is changed."""
    own = {"cpu": _loader.Extension("spectral_ops._C"), "cuda": _loader.Extension("spectral_ops._C_cuda")}
    monkeypatch.setattr(_loader, "EXTENSIONS", own)
    return own


# --- files that are broken ---


def cut(data: bytes, end: float) -> bytes:
    return data[: int(len(data) * end)]


def patched(data: bytes, offset: int, kind: str, value: int) -> bytes:
    data = bytearray(data)
    struct.pack_into(kind, data, offset, value)
    return bytes(data)


BROKEN = {  # what is done to the file, and what the message says
    "empty": (lambda data: b"", "not a shared library (0 bytes)"),
    "garbage": (lambda data: b"<!DOCTYPE html>" * 99, "not a shared library (1485 bytes)"),
    "a header alone": (lambda data: data[:64], "cut short, 64 of "),
    "cut in the middle": (lambda data: cut(data, 0.5), "cut short, "),
    "cut near the end": (lambda data: cut(data, 0.9999), "cut short, "),
    "32 bits": (lambda data: patched(data, 4, "B", 1), "not a 64-bit little-endian shared library"),
    "another machine": (lambda data: patched(data, 18, "<H", 21), "built for ELF machine 21, this machine is "),
    "a pointer of a format": (lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 3, "not a shared library"),
}
LOAD = """
import importlib, json, os, shutil, sys
from pathlib import Path
import torch
import spectral_ops
from spectral_ops import _library, _loader
file = Path(spectral_ops.__file__).with_name("_C.abi3.so")
said = {"first": _loader.EXTENSIONS["cpu"].error}
for broken in sorted(Path(sys.argv[1]).iterdir()):
    shutil.copy(broken, file.with_suffix('.new'))
    os.replace(file.with_suffix('.new'), file)  # the one before may be mapped
    importlib.invalidate_caches()
    _loader.load()
    said[broken.name] = _loader.EXTENSIONS["cpu"].error
said["reference"] = spectral_ops.block_sum(torch.ones(4), 2).tolist()
said["backend"] = spectral_ops.explain("block_sum", torch.ones(4)).backend
said["installed"] = not _loader.CHECKOUT
print(json.dumps(said))
"""


@needs_build
@pytest.mark.slow
def test_a_broken_file_says_so_in_one_line_and_the_reference_serves(tmp_path):
    """In a copy without a checkout around it, as installed. Cut in the middle, dlopen would kill the process."""
    installed, broken = tmp_path / "installed", tmp_path / "broken"
    shutil.copytree(ROOT / "spectral_ops", installed / "spectral_ops", ignore=shutil.ignore_patterns("__pycache__"))
    broken.mkdir()
    data = BUILT.read_bytes()
    for name, (breaks, _) in BROKEN.items():
        (broken / name).write_bytes(breaks(data))
    version = re.search(rb"GLIBC_2\.\d\d(?=\0)", data)[0]  # its name in the table of strings
    (broken / "newer glibc").write_bytes(data.replace(version + b"\0", b"GLIBC_2.99\0"))
    (broken / "without a module").write_bytes(data.replace(b"PyInit__C\0", b"PyInit__X\0"))  # last: it stays loaded
    (broken / "unknown symbol").write_bytes(data.replace(b"PyModule_Create2\0", b"PyModule_Create9\0"))
    shutil.copy(broken / "cut in the middle", installed / "spectral_ops/_C.abi3.so")
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPECTRAL_OPS_")}
    env |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", hide + LOAD, broken]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said.pop("reference") == [2.0, 2.0] and said.pop("backend") == "reference" and said.pop("installed")
    assert said.pop("first") == said["cut in the middle"]
    wanted = {name: message for name, (_, message) in BROKEN.items()}
    wanted |= {"without a module": "PyInit__C", "unknown symbol": "undefined symbol: PyModule_Create9"}
    wanted |= {"newer glibc": "version `GLIBC_2.99' not found"}
    assert said.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in said[name] and "\n" not in said[name], said[name]
        assert str(installed / "spectral_ops/_C.abi3.so") in said[name], said[name]
        assert "pip install --force-reinstall --no-deps" in said[name] and "make build" not in said[name], said[name]
    assert not done.stderr


@needs_build
def test_a_whole_file_is_not_refused(tmp_path):
    assert _loader.damage(BUILT) is None
    with open(tmp_path / "longer.so", "wb") as file:
        file.write(BUILT.read_bytes() + b"appended")
    assert _loader.damage(tmp_path / "longer.so") is None


def test_a_file_that_may_not_be_read_is_named(monkeypatch, tmp_path):
    assert _loader.damage(tmp_path) == "cannot be read (Is a directory)"
    assert _loader.damage(tmp_path / "none.so") == "cannot be read (No such file or directory)"

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    assert _loader.damage(tmp_path / "_C.abi3.so") == "cannot be read (Permission denied)"


# --- environments that do not fit ---


@pytest.fixture
def stand_in(monkeypatch):
    """A module in _C_cuda's place, as torch's dispatcher would meet it."""

    def register():
        module.registered += 1

    module = SimpleNamespace(
        registered=0,
        register=register,
        schema_hash=_library.schema_hash(),
        operators=["block_sum", "lowrank_matmul", "bone_linear_forward", "column_norm"],
        build_info=CUDA_INFO,
    )
    monkeypatch.setitem(sys.modules, "spectral_ops._C_cuda", module)
    monkeypatch.delenv("SPECTRAL_OPS_NO_EXTENSION", raising=False)
    return module


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.9.0a0+git1234", "1.13.1"])
def test_an_older_torch_is_refused_before_dlopen(version, monkeypatch, extensions):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="/nowhere"))
    monkeypatch.setattr(_loader.importlib, "import_module", lambda name: pytest.fail(name))
    monkeypatch.delitem(sys.modules, "spectral_ops._C", raising=False)
    error = _loader._load(extensions["cpu"])
    assert f"was built for torch >= 2.10, this is {version}; the reference and Triton serve" in error
    assert "pip install 'torch>=2.10'" in error


@pytest.mark.parametrize("version", ["2.10.0a0+b558c986e8.nv25.11", "2.10.0", "2.14.1+cu130", "3.0.0"])
def test_a_torch_of_the_same_interface_is_not_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(_loader, "damage", lambda path: None)
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="/nowhere"))
    assert _loader._unfit("spectral_ops._C") is None


def test_cuda_kernels_are_not_loaded_beside_a_torch_without_cuda(monkeypatch):
    """No dlopen, which would say that libtorch_cuda.so is not there."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="/nowhere"))
    assert _loader._unfit("spectral_ops._C_cuda") == (
        f"spectral_ops._C_cuda is not loaded: torch {torch.__version__} has no CUDA"
    )
    monkeypatch.setattr(_loader.importlib.util, "find_spec", lambda name: None)  # nor is its absence a fault to mend
    assert "has no CUDA" in _loader._unfit("spectral_ops._C_cuda")
    assert "spectral_ops._C was not built (run `make build`)" == _loader._unfit("spectral_ops._C")
    monkeypatch.setattr(_loader, "CHECKOUT", False)
    lacking = "spectral_ops._C is not in this wheel (`pip install --force-reinstall --no-deps` {} of spectral_ops)"
    assert _loader._unfit("spectral_ops._C") == lacking.format("a cp310-abi3 wheel")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _loader._unfit("spectral_ops._C") == lacking.format("the wheel +cu12x")


@pytest.mark.parametrize("checkout", [True, False])
def test_a_build_for_another_cuda_is_refused_before_it_registers(checkout, monkeypatch, stand_in, extensions):
    monkeypatch.setattr(_loader, "CHECKOUT", checkout)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    error = _loader._load(extensions["cuda"])
    assert "was built for CUDA 13.0" in error and "is for CUDA 12.8" in error and not stand_in.registered
    assert ("an nvcc of CUDA 12" if checkout else "--no-deps the wheel +cu12x") in error
    monkeypatch.setattr(torch.version, "cuda", "13.2")  # minor versions are compatible
    assert _loader._load(extensions["cuda"]) is None and stand_in.registered == 1


def test_what_build_info_says_of_cuda():
    assert _loader.cuda_build(CUDA_INFO) == ("13.0", ARCHITECTURES)
    assert _loader.cuda_build("GNU 12.2.0, -O3 -DNDEBUG, baseline|avx2, torch 2.13.0") is None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 7), True),  # sm_86
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),  # the family of 10.0f
        ((11, 0), False),
        ((12, 0), True),
        ((12, 1), True),
        ((13, 0), True),  # by the PTX of 12.0
    ],
)
def test_which_devices_have_an_image(capability, runs):
    assert _loader.has_image(ARCHITECTURES, capability) is runs


def test_an_image_with_an_a_runs_on_its_own_version_alone():
    assert not _loader.has_image(("9.0a",), (9, 1)) and not _loader.has_image(("9.0a+PTX",), (10, 0))
    assert not _loader.has_image(("12.0",), (13, 0)) and not _loader.has_image(("8.6",), (8, 0))


# --- a GPU that the kernels have no code for ---


@pytest.fixture
def registrations(monkeypatch):
    """What is entered for the CUDA key meanwhile, which torch is not told."""
    entered = {}
    monkeypatch.setattr(_library.library, "impl", lambda name, run, key: entered.__setitem__((name, key), run))
    return entered


def devices(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


@pytest.mark.parametrize("triton", [True, False])
def test_kernels_are_withdrawn_where_one_gpu_has_no_image(
    triton, monkeypatch, stand_in, extensions, registrations, caplog
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "triton_missing", lambda: None if triton else "not installed")
    waiting = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", waiting.append)
    monkeypatch.delenv("SPECTRAL_OPS_BACKEND", raising=False)
    extensions["cuda"].error = _loader._load(extensions["cuda"])
    backends.activate()
    assert waiting == [backends.check_devices] and "block_sum" not in {name for name, _ in registrations}
    block_sum = _library.OPERATORS["block_sum"]
    assert backends.default(block_sum, "cuda").backend == "cuda"

    devices(monkeypatch, (8, 0), (9, 0))
    waiting[0]()
    assert backends.default(block_sum, "cuda").backend == "cuda" and not caplog.messages

    registrations.clear()
    devices(monkeypatch, (8, 0), (7, 5))
    waiting[0]()
    message = "has code for 8.0, 8.6, 8.9, 9.0a, 10.0f, 12.0+PTX, cuda:1 is sm_75; Triton and the reference serve"
    assert message in extensions["cuda"].error and len(caplog.messages) == 1 and message in caplog.messages[0]
    assert backends.default(block_sum, "cuda").backend == ("triton" if triton else "reference")
    assert message in backends.unavailable(block_sum, "cuda", "cuda")
    known = _library.OPERATORS | _library.LAYERS
    assert registrations.keys() == {(name, "CUDA") for name in stand_in.operators}
    for (name, _), run in registrations.items():
        operator = known[name]
        composed = name in _library.LAYERS or not triton
        assert run == (operator._run_default if composed else operator._run_triton), name


OVERRIDE = """
import warnings
import torch, spectral_ops
from spectral_ops import _library, _loader, backends
warnings.simplefilter("error")
extension = _loader.EXTENSIONS["cuda"]
extension.operators, extension.info = _loader.EXTENSIONS["cpu"].operators, "nvcc 13.0, GNU 12, 8.0, torch 2.13.0"
torch.cuda.device_count, torch.cuda.get_device_capability = lambda: 1, lambda i: (7, 5)
enter = _library.library.impl
_library.library.impl = lambda name, run, key: enter(name, run, "CPU")  # there is no GPU: where the compiled ones are
backends.triton_missing = lambda: "not here"
ran = []
operator = _library.OPERATORS["block_sum"]
reference, operator.reference = operator.reference, lambda *args: ran.append(1) or reference(*args)
assert spectral_ops.block_sum(torch.ones(4), 2).tolist() == [2.0, 2.0] and not ran
backends.check_devices()
assert spectral_ops.block_sum(torch.ones(4), 2).tolist() == [2.0, 2.0] and ran
x, w, D = torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, 5, requires_grad=True)
spectral_ops.bone_linear(x, w, D).sum().backward()
assert len(ran) > 1 and D.grad is not None
"""


@needs_build
@pytest.mark.slow
def test_what_is_entered_later_takes_the_compiled_kernels_place():
    """In torch itself, on the CPU's key: the compiled kernels no longer run, and no warning is seen."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPECTRAL_OPS_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OVERRIDE], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("has code for 8.0, cuda:0 is sm_75") == 1


# --- what `info` says where torch sees no GPU ---


OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\nGCC version: gcc 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


def test_the_driver_is_read_without_starting_cuda(tmp_path):
    file = tmp_path / "version"
    assert info.driver(str(file)) is None
    for text, version in ((OLD, (535, 54, 3)), (OPEN, (580, 65, 6)), ("nothing", None)):
        file.write_text(text)
        assert info.driver(str(file)) == version


@pytest.mark.parametrize(
    ("cuda", "driver", "wanted"),
    [
        (None, None, "and is a build without CUDA"),
        ("13.0", None, "no NVIDIA driver on this machine, as on a login node; CUDA 13.0 needs driver 580 or newer"),
        ("13.0", (535, 54, 3), "driver 535.54.3 is too old: CUDA 13.0 needs driver 580 or newer; update it"),
        ("12.8", (470, 82), "driver 470.82 is too old: CUDA 12.8 needs driver 525 or newer"),
        ("12.8", (535, 54, 3), "driver 535.54.3 is there; CUDA_VISIBLE_DEVICES=''"),
        ("14.0", None, "no NVIDIA driver on this machine, as on a login node; it is for CUDA 14.0"),
    ],
)
def test_why_there_is_no_gpu(cuda, driver, wanted, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(info, "driver", lambda: driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert info.no_gpu().startswith(wanted)


# --- tables that cannot be read ---


def test_a_folder_of_tables_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", str(tmp_path / "none"))
    assert tuning.any_table() is False
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "FOLDER", str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=r"file: Not a directory; wanted a folder of tables that can be read .SPECTRAL_OPS_TUNED"
    ):
        tuning.any_table()
    (tmp_path / "cpu-avx2.json").mkdir()
    with pytest.raises(ValueError, match=r"cpu-avx2.json: Is a directory; wanted a folder of tables that can be read"):
        tuning.read(tmp_path / "cpu-avx2.json")
    assert tuning.read(tmp_path / "sm_90.json") == {}
