"""Thin driver: setuptools packages, CMake and Ninja build. Everything else is in pyproject.toml and CMakeLists.txt.

Environment: SPECTRAL_OPS_SKIP_BUILD=1 (pure Python, no compiler), SPECTRAL_OPS_SKIP_CUDA_BUILD=1, FORCE_CUDA=1 (build
_C_cuda although this torch has no CUDA), TORCH_CUDA_ARCH_LIST, MAX_JOBS, SPECTRAL_OPS_SANITIZE=address,undefined,
SPECTRAL_OPS_DEBUG_FILES=1 (symbols for debuggers beside build/cmake/*.so), SPECTRAL_OPS_LOCAL_VERSION=cu130.
From elsewhere for 64-bit Arm: CMAKE_TOOLCHAIN_FILE=deploy/aarch64.cmake, _PYTHON_HOST_PLATFORM=linux-aarch64.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def version() -> tuple[str, str | None]:
    """The version and the commit: a release at its tag, else a development version; a source archive keeps its own."""
    if (ROOT / "PKG-INFO").exists():
        return re.search(r"^Version: (.+)$", (ROOT / "PKG-INFO").read_text(), re.M)[1], None
    release = re.search(r'^RELEASE = "(.+)"', (ROOT / "spectral_ops/_version.py").read_text(), re.M)[1]
    local = [os.environ[name] for name in ["SPECTRAL_OPS_LOCAL_VERSION"] if os.environ.get(name)]
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local[0]):
        raise SystemExit(f"spectral_ops: SPECTRAL_OPS_LOCAL_VERSION: got {local[0]!r}, wanted such as cu130")
    commit = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "--git-dir", ROOT / ".git", "--work-tree", ROOT]  # whoever owns it, and whatever GIT_DIR says
        ask = lambda *words: subprocess.run([*git, *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
        commit = ask("rev-parse", "--verify", "--quiet", "HEAD") or None
        changed = ["dirty"] * bool(ask("status", "--porcelain", "--untracked-files=no"))
        if f"v{release}" in ask("tag", "--points-at", "HEAD").split() and not changed:
            return "+".join([release, *local]), commit
        local += [f"g{commit[:7]}", *changed] if commit else []
    return "+".join([f"{release}.dev0", *[".".join(local)] * bool(local)]), commit


def tool(name: str) -> str | None:
    """A build tool: the one installed beside this Python, or the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def check_tools(compiles: bool) -> None:
    """Says in one command what this environment lacks; pip would tell the first of it, in its own words."""
    packs = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
    old = tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1)  # newer ones pack wheels by themselves
    lacking = [name for name in ("cmake", "ninja") if compiles and tool(name) is None]
    lacking += ["wheel"] if packs and old and importlib.util.find_spec("wheel") is None else []
    if lacking:
        names = " and ".join(lacking)
        skip = "; SPECTRAL_OPS_SKIP_BUILD=1 builds without a compiler" if lacking != ["wheel"] else ""
        raise SystemExit(f"spectral_ops: {names} not found; run: pip install {' '.join(lacking)}{skip}")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # finds it without the seconds that importing it takes
    if spec is None:
        raise SystemExit("spectral_ops: torch was not found; install it and use `pip install --no-build-isolation`")
    return Path(spec.submodule_search_locations[0])


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=str(Path(home) / "bin")) or shutil.which("nvcc")


def want_cuda() -> bool:
    if flag("SPECTRAL_OPS_SKIP_CUDA_BUILD") or os.environ.get("CMAKE_TOOLCHAIN_FILE"):
        return False  # the second: this nvcc compiles for this machine
    if flag("FORCE_CUDA"):
        return True  # CMake says what is missing if there is no nvcc
    return nvcc() is not None and (torch_folder() / "lib" / "libtorch_cuda.so").exists()


def cmake_build(targets: list[str]) -> Path:
    """Configure once, build what is out of date, and return the build folder, which persists between calls."""
    check_tools(compiles=True)
    sanitize = os.environ.get("SPECTRAL_OPS_SANITIZE", "")
    target = os.environ.get("_PYTHON_HOST_PLATFORM", "")  # of a cross build, as setuptools reads it too
    folder = ROOT / "build" / "-".join(filter(None, ("cmake", target, "sanitize" if sanitize else "")))
    folder.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake")
    configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSPECTRAL_OPS_TORCH_DIR={torch_folder()}"]
    configure += [f"-DSPECTRAL_OPS_CUDA={'ON' if '_C_cuda' in targets else 'OFF'}"]
    configure += [f"-DSPECTRAL_OPS_SANITIZE={sanitize}"]
    configure += [f"-DSPECTRAL_OPS_DEBUG_FILES={'ON' if flag('SPECTRAL_OPS_DEBUG_FILES') else 'OFF'}"]
    configure += [f"-DSPECTRAL_OPS_NVCC={nvcc()}"] * bool(nvcc())
    configure += [f"-DSPECTRAL_OPS_CUDA_ARCHS={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}"]
    build = [cmake, "--build", folder, "--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ninja does not guard a folder against a second ninja
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*build, "--target", *targets], check=True)
    return folder


class CMakeBuild(build_ext):
    def build_extensions(self):
        names = [extension.name.rpartition(".")[2] for extension in self.extensions]
        folder = cmake_build(names)
        for extension, name in zip(self.extensions, names, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")  # never truncate a library that a running process has mapped
            shutil.copyfile(folder / f"{name}.abi3.so", partial)
            os.replace(partial, target)

    def copy_extensions_to_source(self):
        build = self.get_finalized_command("build_py")
        for extension in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build, extension)
            partial = f"{inplace}.partial"
            shutil.copyfile(regular, partial)
            os.replace(partial, inplace)


class FreshBuildPy(build_py):
    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # or modules deleted since the last build would be packed
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "spectral_ops/_built.json"
            target.write_text(json.dumps({"version": VERSION, "commit": COMMIT}) + "\n")


VERSION, COMMIT = version()
extensions = []
if not flag("SPECTRAL_OPS_SKIP_BUILD"):
    extensions = [Extension(f"spectral_ops.{n}", [], py_limited_api=True) for n in ("_C", *["_C_cuda"] * want_cuda())]

if {"build_ext", "bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
    check_tools(compiles=bool(extensions))

packages = {*find_packages(include=["spectral_ops", "spectral_ops.*"]), "spectral_ops.triton_kernels"}

# PEP 639's expression, or for setuptools < 77 the plain text
license_field = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"

setup(
    version=VERSION,
    **{license_field: "Apache-2.0"},
    packages=sorted(packages),
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
