"""What the metadata of a built wheel say."""

from __future__ import annotations

import re
import zipfile
import zlib
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement


class BadWheel(SystemExit):
    """A file that is no wheel, in one line; ends the command that was given it."""


def metadata(wheel: Path) -> Message:
    """The METADATA of a wheel; BadWheel for anything else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            if len(names) != 1:
                raise ValueError(f"got {len(names)} files *.dist-info/METADATA, wanted one")
            return Parser().parsestr(archive.read(names[0]).decode())
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadWheel(f"{wheel}: {error}; wanted a wheel, such as `make wheel` writes to dist/") from None


def requirements(wheel: Path) -> list[Requirement]:
    """Its Requires-Dist."""
    return [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]


def wants_torch(wheel: Path) -> Requirement:
    """What the wheel asks of torch; BadWheel where it asks nothing."""
    for requirement in requirements(wheel):
        if requirement.name == "torch" and requirement.marker is None:
            return requirement
    raise BadWheel(f"{wheel}: got no requirement of torch in its metadata, wanted a wheel of spectral_ops")


def extensions(wheel: Path) -> list[str]:
    """The compiled modules in a wheel of this package, such as "_C"."""
    with zipfile.ZipFile(wheel) as archive:
        return [match[1] for n in archive.namelist() if (match := re.fullmatch(r"spectral_ops/(_C\w*)\..*so", n))]
