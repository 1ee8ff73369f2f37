"""A wheel as an archive: its files, its metadata, and what its extensions say of their own build."""

from __future__ import annotations

import base64
import contextlib
import email
import hashlib
import io
import os
import re
import subprocess
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename

from deploy.commands import ROOT, Refused

FIRST = 315532800  # 1980-01-01, the first day that zip knows


def epoch() -> int:
    """SOURCE_DATE_EPOCH, or the time of the commit: the same sources give the same bytes."""
    if set_time := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(set_time)
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else FIRST


def digest(data: bytes) -> str:
    """SHA-256 as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def pack(files: dict[str, bytes], target: Path) -> None:
    """A wheel of these files, RECORD last; the same files give the same bytes."""
    (info,) = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    record = f"{info}/RECORD"
    names = sorted((n for n in files if n != record), key=lambda n: (n.startswith(info), n))
    rows = [f"{name},sha256={digest(files[name])},{len(files[name])}" for name in names] + [f"{record},,"]
    date = time.gmtime(max(epoch(), FIRST))[:6]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in [*((n, files[n]) for n in names), (record, "\n".join([*rows, ""]).encode())]:
            entry = zipfile.ZipInfo(name, date)
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data, compresslevel=9)
    put(target, written.getvalue())


def put(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; Refused where it cannot be written."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        raise Refused(f"{target}: {error.strerror}; wanted to write {len(data) / 1e6:.1f} MB there") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def unpack(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        for name in ("METADATA", "RECORD", "WHEEL"):
            if sum(n.endswith(f".dist-info/{name}") for n in files) != 1:
                raise ValueError(f"got no *.dist-info/{name}, or several")
        parse_wheel_filename(wheel.name)
    except (OSError, EOFError, NotImplementedError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Refused(f"{wheel}: {error}; wanted a wheel") from None
    return files


def metadata(files: dict[str, bytes]) -> email.message.Message:
    """The fields of METADATA."""
    (name,) = (n for n in files if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(files[name])


def extensions(files: dict[str, bytes]) -> dict[str, Built]:
    """Each compiled extension and what it says of itself."""
    return {name: built(data) for name, data in files.items() if name.endswith(".so")}


# --- what is compiled ---


@dataclass(frozen=True)
class Built:
    """What an extension says of its own build; ``cuda`` is its toolkit's version, empty on the CPU."""

    text: str
    compiler: str = ""
    torch: str = ""
    cuda: str = ""
    driver: str = ""
    archs: tuple[str, ...] = ()


def built(library: bytes) -> Built:
    """Read from the file, not from the loaded module: it may be for another machine or torch."""
    found = re.search(rb"(?:nvcc [\d.]+, driver >= \d+, )?(?:GNU|Clang) [\d.]+, [ -~]*?, torch [\d.]+(?=\0)", library)
    if found is None:
        raise Refused("an extension does not say how it was built; it is not of this version")
    text = found[0].decode()
    cuda = re.match(r"nvcc ([\d.]+), driver >= (\d+), (\S+ [\d.]+), (\S+), torch (\S+)", text)
    if cuda:
        toolkit, driver, compiler, archs, torch = cuda.groups()
        return Built(text, compiler, torch, toolkit, driver, tuple(archs.split("|")))
    compiler, _, rest = text.partition(", ")
    return Built(text, compiler, rest.rpartition("torch ")[2])
