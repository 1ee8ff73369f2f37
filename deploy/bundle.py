"""Write a folder, and a .tar of it, that installs a built wheel where there is no network.

    python -m deploy.bundle dist/spectral_ops-*.whl                      the wheel alone: a cluster has its own torch
    python -m deploy.bundle WHEEL --extras peft --constraint pins.txt    with the wheels that the extra asks for
    python -m deploy.bundle WHEEL --with-torch torch==2.13.0             also torch, for environments that have none

The folder has the wheels, requirements.txt with a hash for each, SHA256SUMS, install.sh and README.txt. ``sh
install.sh`` verifies and installs them into the environment of its Python, and runs ``info`` and ``check``. It leaves
a torch that is there as it is: torch and what only torch asks for are in requirements-torch.txt, which is read where
there is none.

pip chooses and downloads what goes with the wheel, by its own configuration. It evaluates conditions such as
``python_version < "3.11"`` for the Python it runs in: for another version name an interpreter of that version with
``--python``, whose pip is used. ``--platform`` is the target's, such as manylinux_2_28_x86_64. The same wheels give
the same bytes; SOURCE_DATE_EPOCH is the time of every file in the .tar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from deploy.metadata import metadata, requirements, wants_torch

HERE = Path(__file__).resolve().parent
EPOCH = 315532800  # 1980-01-01, the first day that a .zip can have
IN_PLACE = "in.place"  # the local version of a torch that stands for the cluster's


def fail(text: str) -> SystemExit:
    return SystemExit(f"deploy.bundle: {text}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what pip brings ---


def pip_download(into: Path, options: argparse.Namespace, *arguments: str | Path) -> None:
    command = [options.python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", into]
    for platform in platforms(options.platform):
        command += ["--platform", platform]
    if subprocess.run([*command, *arguments]).returncode:
        raise fail("pip could not get what the wheel asks for, for the reason above")


def platforms(tag: str | None) -> list[str]:
    """A platform and, of manylinux, the older ones that it runs too: pip takes only what it is told."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag or "")
    if not match:
        return [tag] if tag else []
    newest, machine = int(match[1]), match[2]
    named = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    found = []
    for minor in range(newest, 4, -1):
        found.append(f"manylinux_2_{minor}_{machine}")
        found += [f"{named[minor]}_{machine}"] if minor in named else []
    return found


def torch_in_place(folder: Path, version: str) -> Path:
    """A wheel that says it is torch and holds nothing, so that pip resolves beside a torch it need not fetch."""
    path = folder / f"torch-{version}+{IN_PLACE}-py3-none-any.whl"
    info = f"torch-{version}+{IN_PLACE}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}+{IN_PLACE}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def collect(folder: Path, options: argparse.Namespace, work: Path) -> tuple[list[Path], list[Path]]:
    """The wheels of requirements.txt and of requirements-torch.txt, in ``folder``."""
    wheel, extras = options.wheel, options.extras
    shutil.copyfile(wheel, folder / wheel.name)
    known = set(metadata(wheel).get_all("Provides-Extra", []))
    if unknown := sorted(set(extras) - known):
        raise fail(f"--extras: got {', '.join(unknown)}, wanted some of {', '.join(sorted(known)) or 'none'}")
    given = ["--constraint", options.constraint] if options.constraint else []
    asked = [r for r in requirements(wheel) if any(applies(r, extra) for extra in ("", *extras))]
    if {r.name for r in asked} != {"torch"}:
        wanted = wants_torch(wheel).specifier
        stub = torch_in_place(work, options.torch)
        if not wanted.contains(options.torch, prereleases=True):
            raise fail(f"--torch: got {options.torch}, wanted {wanted}")
        pin = work / "torch.txt"
        pin.write_text(f"torch=={options.torch}+{IN_PLACE}\n")
        target = f"{wheel.resolve()}[{','.join(extras)}]" if extras else wheel.resolve()
        pip_download(folder, options, "--find-links", work, "--constraint", pin, *given, target)
        (folder / stub.name).unlink()
    here = sorted(folder.glob("*.whl"))
    if not options.with_torch:
        return here, []
    pins = work / "pins.txt"
    names = (parse_wheel_filename(path.name)[:2] for path in here if path.name != wheel.name)
    pins.write_text("".join(f"{name}=={version}\n" for name, version in names))
    pip_download(work / "torch", options, "--constraint", pins, *given, options.with_torch)
    brought = [p for p in sorted((work / "torch").glob("*.whl")) if not (folder / p.name).exists()]
    return here, [Path(shutil.move(path, folder / path.name)) for path in brought]


def applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


# --- what is written ---


def write_requirements(path: Path, wheels: list[Path]) -> None:
    """A pin and a hash for each."""
    lines = []
    for wheel in wheels:
        name, version = parse_wheel_filename(wheel.name)[:2]
        lines.append(f"{name}=={version} --hash=sha256:{digest(wheel)}\n")
    path.write_text("".join(sorted(lines)))


def target(wheels: list[Path]) -> dict:
    """The one Python, machine and least glibc that the wheels run on; None where any does."""
    python, machine, glibc = None, None, None
    for wheel in wheels:
        tags = parse_wheel_filename(wheel.name)[3]
        if all(re.fullmatch(r"cp3\d+", tag.interpreter) and tag.abi.startswith("cp3") for tag in tags):
            python = max(f"3.{tag.interpreter[3:]}" for tag in tags)
        found = [m for tag in tags if (m := re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag.platform))]
        if found:  # the oldest that the wheel names is what it needs
            machine = found[0][2]
            glibc = max(glibc or [2, 0], min([2, int(m[1])] for m in found))
        elif named := [tag.platform for tag in tags if tag.platform.startswith("linux_")]:
            machine = named[0].removeprefix("linux_")
    return {"python": python, "machine": machine, "glibc": glibc}


def unpacked(wheels: list[Path]) -> int:
    """The bytes of what is in them."""
    return sum(info.file_size for wheel in wheels for info in zipfile.ZipFile(wheel).infolist())


def bundle_name(version: str, runs_on: dict, wheel: Path) -> str:
    tag = sorted(parse_wheel_filename(wheel.name)[3], key=str)[0]
    python = f"cp{runs_on['python'].replace('.', '')}" if runs_on["python"] else tag.interpreter
    platform = "any"
    if runs_on["machine"]:
        libc = "manylinux_{}_{}".format(*runs_on["glibc"]) if runs_on["glibc"] else "linux"
        platform = f"{libc}_{runs_on['machine']}"
    return f"spectral_ops-{version}-bundle-{python}-{platform}"


README = """\
spectral_ops {version}, to be installed without a network.

    sh install.sh                           into the environment of `python` on PATH
    PYTHON=/path/to/python sh install.sh    into that one's

It needs {python}, pip and torch{torch}{brings}.
A torch that is there stays as it is. The files are verified against SHA256SUMS first.
requirements.txt lists what is installed; a package of another version there is replaced, so for extras
make an environment over the cluster's: python -m venv --system-site-packages ENV
Without install.sh: python -m pip install --no-index --no-deps --find-links . --require-hashes -r requirements.txt
"""


def write(folder: Path, options: argparse.Namespace, work: Path) -> str:
    """Everything of the bundle into the empty ``folder``; returns its name."""
    plain, heavy = collect(folder, options, work)
    write_requirements(folder / "requirements.txt", plain)
    if heavy:
        write_requirements(folder / "requirements-torch.txt", heavy)
    told = metadata(options.wheel)
    wanted = wants_torch(options.wheel).specifier
    runs_on = target([*plain, *heavy])
    sizes = {"bytes": unpacked(plain), "torch_bytes": unpacked(heavy)}
    facts = {"wheel": options.wheel.name, "torch": str(wanted), **sizes}
    (folder / "bundle.json").write_text(json.dumps({**facts, **runs_on}, indent=1) + "\n")
    text = README.format(
        version=told["Version"],
        python=f"Python {runs_on['python'] or told['Requires-Python']}",
        torch=wanted,
        brings="; where there is no torch it brings one" if heavy else "",
    )
    (folder / "README.txt").write_text(text)
    for name in ("install.sh", "install.py"):
        shutil.copyfile(HERE / name, folder / name)
    (folder / "install.sh").chmod(0o755)
    files = sorted(path.name for path in folder.iterdir())
    (folder / "SHA256SUMS").write_text("".join(f"{digest(folder / name)}  {name}\n" for name in files))
    return bundle_name(told["Version"], runs_on, options.wheel)


def write_tar(folder: Path, path: Path) -> None:
    """The files in order, of nobody and of one time: the same files give the same bytes."""
    time = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(folder.iterdir()):
            member = tarfile.TarInfo(f"{path.stem}/{file.name}")
            member.size, member.mtime, member.mode = file.stat().st_size, time, 0o755 if file.suffix == ".sh" else 0o644
            with file.open("rb") as stream:
                archive.addfile(member, stream)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bundle", description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="+", help="the built wheel")
    parser.add_argument("--out", type=Path, help="the folder to write; by default dist/ and the bundle's own name")
    parser.add_argument("--extras", nargs="+", default=[], metavar="NAME", help="such as peft")
    parser.add_argument("--with-torch", metavar="SPEC", help="bring this torch too, such as torch==2.13.0")
    parser.add_argument(
        "--torch", metavar="VERSION", help="the cluster's, to choose the extras' versions by; the least"
    )
    parser.add_argument("--constraint", type=Path, metavar="FILE", help="versions to choose, as pip's --constraint")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="an interpreter of the target's version"
    )
    parser.add_argument("--platform", metavar="TAG", help="the target's, such as manylinux_2_28_x86_64")
    options = parser.parse_args(argv)
    if len(options.wheel) > 1:  # what a shell makes of dist/*.whl
        raise fail(f"got {len(options.wheel)} wheels, {', '.join(p.name for p in options.wheel)}; wanted one")
    (options.wheel,) = options.wheel
    least = min(s.version for s in wants_torch(options.wheel).specifier if s.operator == ">=")
    options.torch = options.torch or re.match(r"[\d.]*\d", least.replace(".dev0", ""))[0]
    if options.with_torch and canonicalize_name(Requirement(options.with_torch).name) != "torch":
        parser.error(f"--with-torch: got {options.with_torch!r}, wanted a torch, such as torch==2.13.0")
    parent = options.out.parent if options.out else Path("dist")
    work = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".bundle-", dir=parent))  # beside what it becomes, to be renamed
        for name in ("files", "stub"):
            (work / name).mkdir()
        name = write(work / "files", options, work / "stub")
        out = options.out or parent / name
        tar = out.with_name(f"{out.name}.tar")
        for path in (out, tar):
            if path.exists():
                raise fail(f"{path}: exists, wanted a new name; remove it or choose another --out")
        write_tar(work / "files", work / tar.name)
        (work / "files").chmod(0o755)
        os.rename(work / "files", out)
        os.rename(work / tar.name, tar)
    except OSError as error:
        raise fail(
            f"{parent}: {error.strerror or error}; wanted a folder that can be written, with room; --out names another"
        ) from None
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(list(out.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB; {tar}: SHA-256 {digest(tar)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
