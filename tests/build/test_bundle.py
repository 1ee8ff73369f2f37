"""The offline bundle: what it holds, that it installs without a network and leaves torch alone, and what it refuses."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from deploy import bundle, install

ROOT = Path(__file__).resolve().parents[2]
DEAD = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}


def call(*command, check=True, cwd=None, **env) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SPECTRAL_OPS_", "PIP_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**inherited, "PIP_CONFIG_FILE": os.devnull, **env}
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def make_wheel(folder: Path, name: str, version: str, *requires: str, tag="py3-none-any", provides=()) -> Path:
    """An empty package with these requirements."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"Requires-Dist: {text}" for text in requires] + [f"Provides-Extra: {text}" for text in provides]
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=3.10\n"
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{info}/METADATA", head + "".join(f"{line}\n" for line in lines))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def empty_wheel(tmp_path_factory) -> Path:
    """Our name, and nothing in it: enough for whatever ends before the package is imported."""
    return make_wheel(tmp_path_factory.mktemp("empty"), "spectral_ops", "1.2", "torch>=2.10.dev0")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> Path:
    """Built in a copy, because test_build.py may be packing in the checkout at the same time."""
    folder = tmp_path_factory.mktemp("pure")
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("spectral_ops", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / "copy" / name, symlinks=True, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "copy")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--no-index")
    pip = (sys.executable, "-m", "pip", "wheel", *options, "-w", folder, folder / "copy")
    call(*pip, SPECTRAL_OPS_SKIP_BUILD="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return next(folder.glob("*.whl"))


def lend(folder: Path, *packages: str) -> Path:
    """A folder through which an environment sees these packages of ours, with what they require, and no others."""
    folder.mkdir()
    left, seen = list(packages), set()
    while left:
        if (name := left.pop().lower()) in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        site = Path(found.locate_file(""))
        tops = {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__", "bin")}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return folder


def environment(folder: Path, *lent: Path) -> Path:
    """The Python of a fresh environment that sees ``lent``."""
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def pip(tmp_path_factory) -> Path:
    return lend(tmp_path_factory.mktemp("lent") / "pip", "pip")


def torch_metadata(folder: Path, version: str) -> Path:
    """What pip sees of a torch of this version."""
    info = folder / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


# --- pip and the torch that is there ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "version",
    ["2.10.0", "2.13.0+cpu", "2.14.1+cu130", "2.10.0a0+b558c986e8.nv25.11", "2.11.0.dev20260101+cu130", "2.9.1"],
)
def test_pip_never_takes_another_torch(version, pure_wheel, pip, tmp_path):
    """Releases, local builds, NGC's alphas and nightlies stay; beside an older one pip is told what the wheel asks."""
    there = torch_metadata(tmp_path / "torch", version)
    python = environment(tmp_path / "env", pip, there)
    offered = make_wheel(tmp_path / "index", "torch", "2.99.0").parent  # what pip would rather have
    allowed = version != "2.9.1"
    links = ("--find-links", offered) if allowed else ()
    command = (
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-index",
        *links,
        "--report",
        "-",
        pure_wheel,
    )
    done = call(*command, check=allowed, cwd=tmp_path)
    if allowed:
        assert [item["metadata"]["name"].replace("-", "_") for item in json.loads(done.stdout)["install"]] == [
            "spectral_ops"
        ]
    else:
        assert done.returncode and "No matching distribution found for torch>=2.10" in done.stderr


# --- installing from it ---


@pytest.mark.slow
def test_installs_and_checks_without_a_network(pure_wheel, pip, tmp_path):
    assert bundle.main([str(pure_wheel), "--out", str(tmp_path / "bundle")]) == 0
    with tarfile.open(tmp_path / "bundle.tar") as archive:
        archive.extractall(tmp_path / "node", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    python = environment(tmp_path / "env", pip, lend(tmp_path / "torch", "torch"))
    no_network = ["unshare", "-rn"]  # a network namespace of its own, where the kernel gives one
    if shutil.which("unshare") is None or subprocess.run([*no_network, "true"], capture_output=True).returncode:
        no_network = []
    script = tmp_path / "node" / "bundle" / "install.sh"
    done = call(*no_network, "sh", script, cwd=tmp_path, PYTHON=str(python), OMP_NUM_THREADS="1", **DEAD)
    assert f"spectral_ops {pure_wheel.name.split('-')[1]}, torch {torch.__version__}" in done.stdout
    assert "All operators agree with the float64 reference" in done.stdout
    code = "import spectral_ops; print(spectral_ops.__file__)"
    assert Path(call(python, "-W", "ignore", "-c", code, cwd=tmp_path).stdout.strip()).is_relative_to(tmp_path / "env")


@pytest.fixture
def made(empty_wheel, tmp_path) -> Path:
    bundle.main([str(empty_wheel), "--out", str(tmp_path / "made")])
    return tmp_path / "made"


def refused(folder: Path, python: Path | str) -> str:
    """The one line that install.sh ends with."""
    done = call("sh", folder / "install.sh", check=False, cwd=folder.parent, PYTHON=str(python), **DEAD)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_a_changed_or_missing_file_is_named(made):
    (made / "requirements.txt").write_text("other\n")
    assert "requirements.txt: FAILED, wanted the files that SHA256SUMS lists" in refused(made, sys.executable)
    (made / "README.txt").unlink()
    assert "README.txt: FAILED" in refused(made, sys.executable)
    (made / "SHA256SUMS").unlink()
    assert "SHA256SUMS: not found, wanted a whole bundle" in refused(made, sys.executable)


def test_a_python_that_will_not_do_is_named(made, tmp_path):
    assert "does not run, wanted a Python of 3.10 or newer" in refused(made, tmp_path / "none")
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.9;; *) exit 1;; esac\n')
    old.chmod(0o755)
    assert f"{old}: is Python 3.9, wanted 3.10 or newer" in refused(made, old)


def test_an_environment_that_lacks_something_is_refused(made, pip, tmp_path):
    bare = environment(tmp_path / "a bare one")
    assert f"{bare}: has no pip, wanted one; run: '{bare}' -m ensurepip" in refused(made, bare)
    without = environment(tmp_path / "without", pip)
    assert f"{without}: has no torch, wanted torch>=2.10" in refused(made, without)
    old = environment(tmp_path / "an old one", pip, torch_metadata(tmp_path / "torch", "2.9.1"))
    assert "torch is 2.9.1, wanted >=2.10.dev0; for the reference and Triton alone run: " in refused(made, old)
    (command,) = re.findall("run: (.*)", refused(made, old))
    call(*shlex.split(command))  # what it says can be done
    assert (
        call(old, "-c", "import importlib.metadata as m; print(m.version('spectral_ops'))", cwd=tmp_path).stdout
        == "1.2\n"
    )


FACTS = {"python": None, "machine": None, "glibc": None, "bytes": 1, "torch_bytes": 0}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"python": "3.99"}, r"is Python 3\.\d+, wanted 3\.99, for which this bundle was made"),
        ({"machine": "sparc"}, r"this machine is \w+, wanted sparc"),
        ({"glibc": [9, 1]}, r"this system has .*, wanted glibc 9\.1; use the pure wheel"),
    ],
)
def test_another_interpreter_or_system_is_refused(facts, message):
    install.check_interpreter(FACTS)
    with pytest.raises(SystemExit, match=message):
        install.check_interpreter({**FACTS, **facts})


def test_no_permission_and_no_room_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match=r"MiB free, wanted \d{5,} MiB"):
        install.check_environment({**FACTS, "bytes": 2**62})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="no permission to write, wanted an environment of your own; run: .* -m venv"):
        install.check_environment(FACTS)


# --- what it holds ---


def test_the_same_wheel_gives_the_same_bytes(empty_wheel, tmp_path, monkeypatch, capsys):
    tars = []
    for name, umask in (("a", 0o022), ("b", 0o077)):
        before = os.umask(umask)
        try:
            bundle.main([str(empty_wheel), "--out", str(tmp_path / name / "same")])
        finally:
            os.umask(before)
        tars.append((tmp_path / name / "same.tar").read_bytes())
    assert tars[0] == tars[1]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    bundle.main([str(empty_wheel), "--out", str(tmp_path / "c" / "same")])
    with tarfile.open(tmp_path / "c" / "same.tar") as archive:
        assert {member.mtime for member in archive} == {1000000000}
        assert {member.uid for member in archive} == {0}
    assert "1 wheels" in capsys.readouterr().out


def test_extras_and_torch_come_in_files_of_their_own(tmp_path, monkeypatch):
    """Without --with-torch nothing of torch is fetched, although an extra asks for it."""
    index = tmp_path / "index"
    wheel = make_wheel(
        tmp_path, "spectral_ops", "1.2", "torch>=2.10.dev0", 'tuner>=1; extra == "peft"', provides=["peft"]
    )
    make_wheel(index, "tuner", "1.5", "torch>=1.13", "shared")
    make_wheel(index, "tuner", "2.0", "torch>=2.99", "shared")  # for another torch than the cluster's
    make_wheel(index, "shared", "3.0")
    make_wheel(index, "torch", "2.13.0", "shared", "mathematics")
    make_wheel(index, "mathematics", "0.1")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    bundle.main([str(wheel), "--extras", "peft", "--with-torch", "torch==2.13.0", "--out", str(out)])
    lines = {name: (out / name).read_text() for name in ("requirements.txt", "requirements-torch.txt")}
    pins = {name: re.findall(r"^(\S+) --hash=sha256:[0-9a-f]{64}$", text, re.M) for name, text in lines.items()}
    assert pins["requirements.txt"] == ["shared==3.0", "spectral-ops==1.2", "tuner==1.5"]
    assert pins["requirements-torch.txt"] == ["mathematics==0.1", "torch==2.13.0"]
    facts = json.loads((out / "bundle.json").read_text())
    assert facts["torch_bytes"] and facts["torch"] == ">=2.10.dev0" and facts["python"] is None
    listed = [line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(path.name for path in out.iterdir() if path.name != "SHA256SUMS")


def test_what_a_bundle_runs_on_is_that_of_its_wheels(tmp_path):
    ours = make_wheel(tmp_path, "spectral_ops", "1.2", tag="cp310-abi3-manylinux_2_28_x86_64")
    other = make_wheel(tmp_path, "numbers", "1", tag="cp312-cp312-manylinux_2_34_x86_64")
    assert bundle.target([ours]) == {"python": None, "machine": "x86_64", "glibc": [2, 28]}
    runs_on = bundle.target([ours, other])
    assert runs_on == {"python": "3.12", "machine": "x86_64", "glibc": [2, 34]}
    assert bundle.bundle_name("1.2", runs_on, ours) == "spectral_ops-1.2-bundle-cp312-manylinux_2_34_x86_64"
    assert bundle.bundle_name("1.2", bundle.target([ours]), ours).endswith("-bundle-cp310-manylinux_2_28_x86_64")
    assert bundle.platforms("manylinux_2_18_x86_64")[:3] == [
        "manylinux_2_18_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "none.whl: .*No such file.*; wanted a wheel, such as `make wheel` writes to dist/"),
        (["{text}"], "text.whl: File is not a zip file; wanted a wheel"),
        (["{wheel}", "{none}"], r"got 2 wheels, spectral_ops.*\.whl, none\.whl; wanted one$"),
        (["{wheel}", "--extras", "pfet"], "--extras: got pfet, wanted some of none"),
        (["{wheel}", "--with-torch", "numpy"], None),
        (["{wheel}", "--out", "{there}"], "there: exists, wanted a new name"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, empty_wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.whl").write_text("text")
    (tmp_path / "there").mkdir()
    names = {"wheel": empty_wheel, **{n: tmp_path / n for n in ("there",)}}
    names |= {n: tmp_path / f"{n}.whl" for n in ("none", "text")}
    with pytest.raises(SystemExit, match=message) as raised:
        bundle.main([argument.format(**names) for argument in arguments])
    if message is None:
        assert "--with-torch: got 'numpy', wanted a torch" in capsys.readouterr().err
    else:
        assert "\n" not in str(raised.value)
    left = {path for folder in (tmp_path, tmp_path / "dist") for path in folder.glob("*")}
    assert left <= {tmp_path / "text.whl", tmp_path / "there", tmp_path / "dist"}


def test_a_folder_that_cannot_be_written_is_one_line(empty_wheel, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^deploy.bundle: .*file: File exists; wanted a folder that can be written"):
        bundle.main([str(empty_wheel), "--out", str(tmp_path / "file/out")])


def test_a_full_disk_is_one_line_and_leaves_nothing(empty_wheel, tmp_path, monkeypatch):
    def full(folder, path):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle, "write_tar", full)
    with pytest.raises(SystemExit, match=r"^deploy.bundle: .*: No space left on device; wanted a folder"):
        bundle.main([str(empty_wheel), "--out", str(tmp_path / "new/out")])
    assert not list((tmp_path / "new").iterdir())


def test_install_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on PATH: apt-get install shellcheck")
    call("shellcheck", ROOT / "deploy" / "install.sh")
