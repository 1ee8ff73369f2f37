"""Second half of a bundle's install.sh, which has verified this file: checks the environment, installs, tries it.

It needs the standard library and pip alone. Whatever is wrong is said in one line before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = shlex.quote(sys.executable)  # in a command to copy
NETWORKLESS = ("--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--find-links", HERE)


def fail(text: str) -> SystemExit:
    return SystemExit(f"install.sh: {text}")


def torch_version() -> str | None:
    """As the environment's own metadata have it: importing torch takes seconds, and fails where a driver is broken."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_interpreter(bundle: dict) -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    if bundle["python"] and version != bundle["python"]:
        raise fail(f"{sys.executable}: is Python {version}, wanted {bundle['python']}, for which this bundle was made")
    if bundle["machine"] and platform.machine() != bundle["machine"]:
        raise fail(f"this machine is {platform.machine()}, wanted {bundle['machine']}; make a bundle for it")
    if bundle["glibc"]:
        name, _, found = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        if name != "glibc" or [int(n) for n in found.split(".")] < bundle["glibc"]:
            wanted = ".".join(map(str, bundle["glibc"]))
            raise fail(f"this system has {name or 'another libc'} {found}, wanted glibc {wanted}; use the pure wheel")


def check_environment(bundle: dict) -> None:
    if importlib.util.find_spec("pip") is None:
        raise fail(f"{sys.executable}: has no pip, wanted one; run: {PYTHON} -m ensurepip")
    site = Path(sysconfig.get_path("purelib"))
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and managed.exists() and not os.environ.get("PIP_BREAK_SYSTEM_PACKAGES"):
        make = f"{PYTHON} -m venv --system-site-packages ENV"
        raise fail(f"{sys.executable}: belongs to the system, wanted an environment; run: {make}")
    if not os.access(site, os.W_OK):
        make = f"{PYTHON} -m venv --system-site-packages ENV"
        raise fail(f"{site}: no permission to write, wanted an environment of your own; run: {make}")
    free, wanted = (
        shutil.disk_usage(site).free,
        bundle["bytes"] + (bundle["torch_bytes"] if torch_version() is None else 0),
    )
    if free < wanted:
        raise fail(f"{site}: {free >> 20} MiB free, wanted {wanted >> 20} MiB")


def check_torch(bundle: dict) -> str | None:
    """Its version; None where there is none and the bundle brings one."""
    from pip._vendor.packaging.specifiers import SpecifierSet

    found = torch_version()
    if found is None:
        if not bundle["torch_bytes"]:
            raise fail(f"{sys.executable}: has no torch, wanted torch{bundle['torch']}; install your cluster's first")
    elif not SpecifierSet(bundle["torch"]).contains(found, prereleases=True):
        alone = f"{PYTHON} -m pip install --no-index --no-deps {shlex.quote(str(HERE / bundle['wheel']))}"
        raise fail(f"torch is {found}, wanted {bundle['torch']}; for the reference and Triton alone run: {alone}")
    return found


def install(requirements: str) -> None:
    """Exactly what the file lists, with its hashes; no setting of the user or the machine adds an index."""
    env = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pip", "--isolated", "install", *NETWORKLESS, "--require-hashes"]
    command += ["--break-system-packages"] * bool(os.environ.get("PIP_BREAK_SYSTEM_PACKAGES"))
    if subprocess.run([*command, "-r", HERE / requirements], cwd=HERE, env=env).returncode:
        raise fail(f"pip could not install {requirements}, for the reason above")


def run(command: str) -> None:
    """``python -m spectral_ops command``, from a folder that lends it nothing."""
    print(f"\n$ {sys.executable} -m spectral_ops {command}", flush=True)
    if subprocess.run([sys.executable, "-m", "spectral_ops", command], cwd="/").returncode:
        raise fail(f"installed, but `python -m spectral_ops {command}` failed as above")


def main() -> None:
    bundle = json.loads((HERE / "bundle.json").read_text())
    check_interpreter(bundle)
    check_environment(bundle)
    before = check_torch(bundle)
    if before is None:
        install("requirements-torch.txt")
    install("requirements.txt")
    importlib.invalidate_caches()
    if before is not None and torch_version() != before:
        raise fail(f"torch was {before} and is {torch_version()}, wanted it untouched; please report this")
    run("info")
    run("check")


if __name__ == "__main__":
    main()
