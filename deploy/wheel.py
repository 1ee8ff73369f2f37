"""Build a wheel that an index takes, and look into one: ``python -m deploy.wheel build | repair | audit | reproduce``.

``build`` compiles for every GPU generation where nvcc is there, and repairs the wheel. ``repair`` gives a wheel its
manylinux tag, its bill of materials and what it was built for in its metadata. ``audit`` holds a wheel to everything
that docs/wheels.md promises. ``reproduce`` builds twice in different folders and compares the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from deploy.archive import epoch, put, unpack
from deploy.audit import audit
from deploy.commands import ROOT, Refused, run, tool
from deploy.repair import repair


def toolkit(major: str) -> Path:
    """The folder of a CUDA toolkit of this major version."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += map(str, sorted(Path("/usr/local").glob("cuda*"), reverse=True))
    homes += [str(Path(nvcc).resolve().parents[1]) for nvcc in [shutil.which("nvcc")] if nvcc]
    seen = {}
    for home in filter(None, homes):
        nvcc = Path(home) / "bin/nvcc"
        if nvcc.exists():
            found = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
            if found and found[1] == major:
                return Path(home)
            seen[home] = found[0] if found else "no version"
    had = "; ".join(f"{home}: {what}" for home, what in seen.items()) or "no nvcc at all"
    raise Refused(f"CUDA={major}: wanted an nvcc of CUDA {major}; found {had}; set CUDA_HOME to one")


def build(cuda: str, pure: bool, debug: bool, folder: Path, root: Path = ROOT, target: str = "") -> Path:
    """Compile, pack and repair. ``cuda``: "" for what is there and a plain version, "none" (+cpu), "12", "13" (+cu130).

    ``target``: "aarch64" compiles the CPU kernels for 64-bit Arm, whatever this machine is.
    """
    env = {"SOURCE_DATE_EPOCH": str(epoch())}
    if target:
        if cuda or pure:
            raise Refused(f"--target {target}: compiles CPU kernels; wanted neither --cuda nor --pure with it")
        if tool(f"{target}-linux-gnu-g++") is None:
            raise Refused(f"--target {target}: no {target}-linux-gnu-g++; run: apt install g++-{target}-linux-gnu")
        file = root / f"deploy/{target}.cmake"
        env |= {"CMAKE_TOOLCHAIN_FILE": str(file), "_PYTHON_HOST_PLATFORM": f"linux-{target}"}
    elif pure:
        if cuda or debug:
            raise Refused("--pure: compiles nothing; wanted neither --cuda nor --debug-files with it")
        env["SPECTRAL_OPS_SKIP_BUILD"] = "1"
    elif cuda == "none":
        env |= {"SPECTRAL_OPS_SKIP_CUDA_BUILD": "1", "SPECTRAL_OPS_LOCAL_VERSION": "cpu"}
    elif cuda:
        home = toolkit(cuda)
        release = re.search(r"release (\d+)\.(\d+)", run(home / "bin/nvcc", "--version"))
        local = f"cu{release[1]}{release[2]}"
        env |= {"FORCE_CUDA": "1", "CUDA_HOME": str(home), "SPECTRAL_OPS_LOCAL_VERSION": local}
    elif shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists():
        env["FORCE_CUDA"] = "1"
    if debug:
        env["SPECTRAL_OPS_DEBUG_FILES"] = "1"
    with tempfile.TemporaryDirectory() as made:
        options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
        run(sys.executable, "-m", "pip", "wheel", *options, "-w", made, root, cwd=root, **env)
        (wheel,) = Path(made).glob("*.whl")
        repaired = repair(wheel, folder)
    if debug:
        for file in (root / f"build/cmake{f'-linux-{target}' if target else ''}").glob("*.so.debug"):
            if file.name.removesuffix(".debug") in {Path(n).name for n in unpack(repaired)}:
                put(folder / file.name, file.read_bytes())
    return repaired


def reproduce(cuda: str, pure: bool, folder: Path) -> int:
    """Build a clean copy of this commit in two folders of different length; where both wheels are the same bytes, it is
    put into ``folder`` and 0 returned."""
    digests = []
    with tempfile.TemporaryDirectory() as made:
        for name in ("a", "another-folder"):
            root = Path(made) / name
            run("git", "clone", "--quiet", ROOT, root)
            wheel = build(cuda, pure, False, Path(made) / f"dist-{name}", root)
            digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
            print(f"{digests[-1]}  {wheel.name}  in a folder of {len(str(root))} letters", flush=True)
        same = digests[0] == digests[1]
        if same:
            put(folder / wheel.name, wheel.read_bytes())
    print("the same bytes" if same else "they differ")
    return 0 if same else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.wheel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "reproduce"):
        command = commands.add_parser(name)
        command.add_argument("--cuda", default="", choices=("", "none", "12", "13"), help="a version with a local tag")
        command.add_argument("--pure", action="store_true", help="the reference and Triton, for every platform")
        command.add_argument("--dest", type=Path, default=ROOT / "dist")
        if name == "build":
            command.add_argument("--target", default="", choices=("aarch64",), help="CPU kernels for another processor")
            command.add_argument("--debug-files", action="store_true", help="symbols for debuggers beside the wheel")
    command = commands.add_parser("repair")
    command.add_argument("wheel", type=Path)
    command.add_argument("dest", type=Path)
    command = commands.add_parser("audit")
    command.add_argument("wheels", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    if arguments.command == "reproduce":
        return reproduce(arguments.cuda, arguments.pure, arguments.dest)
    if arguments.command == "repair":
        print(repair(arguments.wheel, arguments.dest))
        return 0
    if arguments.command == "build":
        options = (arguments.cuda, arguments.pure, arguments.debug_files, arguments.dest)
        wheels = [build(*options, target=arguments.target)]
    else:
        wheels = arguments.wheels
    faults = []
    for wheel in wheels:
        result = audit(wheel)
        print("\n".join(result.seen))
        faults += [f"{wheel.name}: {fault}" for fault in result.faults]
    print("\n".join(["", "faults:", *faults]) if faults else "\nno faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
