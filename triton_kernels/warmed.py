"""A folder of kernels compiled ahead, which `python -m spectral_ops warmup` writes and compute nodes read.

It is laid out as Triton's own cache: a folder per key. Beside Triton's files each has ``spectral_ops.json``, with the
SHA-256 of every one, so that a copy that broke on its way is compiled anew and not loaded. Triton's own reader takes
files by the absolute paths they were written under, and makes folders for what it lacks. So a copy elsewhere, or one
that cannot be written, needs the reader here: :func:`activate` puts it before Triton's where
``SPECTRAL_OPS_TRITON_CACHE`` names the folder. What the folder lacks, Triton compiles into its own cache as ever.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton import __version__ as triton_version
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import CacheManager, FileCacheManager, triton_key

from spectral_ops import _files
from spectral_ops._version import __version__
from spectral_ops.triton_kernels import VARIABLE

CONTENTS = "spectral_ops.json"  # of an entry
MANIFEST = "manifest.json"  # of the folder
VERSION = 1
GROUP = "__grp__"  # Triton's list of an entry's files
MEND = "delete it, and `python -m spectral_ops warmup` writes it anew"

logger = logging.getLogger("spectral_ops")


# --- an entry --------------------------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(entry: Path) -> dict[str, Path]:
    """The files of an entry by name; none where there is no entry. Raises ValueError naming a file that is not as it
    was written."""
    contents = entry / CONTENTS
    try:
        listed = json.loads(contents.read_text())["files"]
        found = {name: entry / name for name in listed}
        broken = [name for name, path in found.items() if _digest(path) != listed[name]]
    except FileNotFoundError as error:
        if not entry.exists():
            return {}
        raise ValueError(f"{error.filename}: not there; {MEND}") from None
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; {MEND}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{contents}: not the contents of an entry; {MEND}") from None
    if broken:
        raise ValueError(f"{entry / broken[0]}: not what was written there (truncated?); {MEND}")
    return found


def keep(made: Path, folder: Path) -> int:
    """Move an entry that Triton has just made into ``folder``, whole, and return its bytes.

    Of Triton's files those stay that a launch reads: no intermediate code, which names paths of this machine. One that
    is there already and sound is left alone.
    """
    target = folder / made.name
    whole = made.with_name(f"{made.name}.whole")
    whole.mkdir()
    names = [p.name for p in made.iterdir() if p.suffix in (".cubin", ".json", ".so") and not p.name.startswith(GROUP)]
    for name in names:
        shutil.copyfile(made / name, whole / name)
    for group in made.glob(f"{GROUP}*"):
        paths = {name: str(target / name) for name in sorted(names)}
        (whole / group.name).write_text(json.dumps({"child_paths": paths}))
    listed = {name: _digest(whole / name) for name in sorted(names)}
    (whole / CONTENTS).write_text(json.dumps({"version": VERSION, "files": listed}, indent=1) + "\n")
    try:
        sound = bool(files(target))
    except ValueError:
        os.replace(target, made.with_name(f"{made.name}.broken"))
        sound = False
    if not sound:
        try:
            os.replace(whole, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # those: somebody else has just moved theirs there
                raise
    shutil.rmtree(made)
    return sum(p.stat().st_size for p in target.iterdir())


# --- the folder ------------------------------------------------------------------------------------------------------


@functools.cache
def _sources() -> str:
    """A hash of the kernels' sources: Triton's keys hold the text of each kernel and the line where it begins."""
    rest = {"__init__.py", "aot.py", "warmed.py"}
    paths = sorted(p for p in Path(__file__).parent.glob("*.py") if p.name not in rest)
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in paths)).hexdigest()[:16]


def identity(target: int) -> dict[str, Any]:
    """What decides, beside a launch itself, under which key Triton keeps a kernel for this compute capability."""
    backend = make_backend(GPUTarget("cuda", target, 32))
    compiler = f"{triton_key()}-{backend.hash()}-{backend.parse_options({'debug': knobs.runtime.debug}).hash()}"
    return {
        "arch": f"sm_{target}",
        "spectral_ops": __version__,
        "kernels": _sources(),
        "triton": triton_version,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "compiler": hashlib.sha256(compiler.encode()).hexdigest()[:16],
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
    }


def misfits(run: dict[str, Any]) -> list[str]:
    """Why what one run of ``warmup`` wrote is of no use to this installation; empty where it is."""
    here = identity(int(run["arch"].removeprefix("sm_")))
    named = [
        f"{name} {run.get(name)}, here {here[name]}" for name in ("triton", "python") if run.get(name) != here[name]
    ]
    if not named and run.get("compiler") != here["compiler"]:
        named = [f"another build of triton {triton_version}, another ptxas, or other options in Triton's environment"]
    if run.get("kernels") != here["kernels"]:
        named.append(f"kernels of spectral_ops {run.get('spectral_ops')}, here others of {__version__}")
    if run.get("environment") != here["environment"]:
        named.append(f"Triton's environment {run.get('environment')}, here {here['environment']}")
    return named


def manifest(folder: Path) -> list[dict[str, Any]]:
    """What each run of ``warmup`` wrote into the folder; raises ValueError naming a file that cannot be read."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise ValueError(f"{path}: got version {data['version']!r}, wanted {VERSION}; {MEND}")
        runs = data["runs"]
        if all(int(run["arch"].removeprefix("sm_")) and run["methods"] for run in runs):
            return runs
    except FileNotFoundError:
        if not folder.exists() or not any(folder.iterdir()):
            return []
        raise ValueError(f"{path}: not there, wanted a folder that `python -m spectral_ops warmup` wrote") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        pass
    raise ValueError(f"{path}: not a manifest of warmed kernels; {MEND}")


def note(folder: Path, run: dict[str, Any] | None = None) -> None:
    """Write the folder's manifest, with one run more where one is given; raises ValueError as :func:`manifest` does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or of two runs at once one would overwrite what the other has noted
        runs = [one for one in manifest(folder) if one != run] + ([run] if run else [])
        text = json.dumps({"version": VERSION, "runs": runs}, indent=1) + "\n"
        _files.write(folder / MANIFEST, lambda part: part.write_text(text))
    finally:
        os.close(lock)


def describe(folder: Path, target: int | None = None) -> tuple[list[str], bool]:
    """A line for every run that wrote into the folder, and whether one fits this installation, and ``target`` where it
    is given."""
    if not folder.is_dir():
        return [f"{folder}: no such folder"], False
    try:
        runs = manifest(folder)
    except ValueError as error:
        return [str(error)], False
    lines, fits = [], False
    for run in runs:
        try:
            why_not = misfits(run)
        except (OSError, RuntimeError) as error:  # no ptxas, as in a build for ROCm
            return [f"{folder}: nothing in it fits a triton without its compiler for NVIDIA ({error})"], False
        if target is not None and run["arch"] != f"sm_{target}":
            why_not.append(f"this GPU is sm_{target}")
        fits |= not why_not
        what = f"{run['arch']}, {' '.join(run['methods'])}, {' '.join(run.get('dtypes', []))}"
        by = f"spectral_ops {run.get('spectral_ops')}, triton {run.get('triton')}, Python {run.get('python')}"
        lines.append(f"{what}, by {by}: " + ("does not fit: " + "; ".join(why_not) if why_not else "fits"))
    return lines or [f"{folder}: nothing was warmed"], fits


# --- reading it ------------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """What this process has taken from the folder, and what it has not found there."""

    folder: Path
    writing: bool = False  # by warmup: what is made goes nowhere else
    hits: int = 0
    others: int = 0  # from Triton's own cache
    compiled: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        misses = (
            f", {len(self.compiled)} compiled here ({', '.join(sorted(set(self.compiled)))})" if self.compiled else ""
        )
        others = f", {self.others} from Triton's own cache" if self.others else ""
        return f"Triton kernels: {self.hits} from {self.folder}{others}{misses or ', none compiled here'}"


used: Use | None = None


@functools.cache
def _told(line: str) -> None:
    logger.warning(line)


@functools.cache
def _writable() -> str:
    """A folder for this process where Triton's own cache cannot be written."""
    folder = tempfile.mkdtemp(prefix="spectral_ops-triton-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class WarmedCacheManager(CacheManager):
    """One entry, read from the folder where it is there and whole, and otherwise Triton's as ever."""

    before: type[CacheManager] | None = None  # another manager that was set when this one came

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.key, self.how = key, {"override": override, "dump": dump}
        self.found: dict[str, Path] = {}
        if used is not None and not override and not dump:
            try:
                self.found = files(used.folder / key)
            except ValueError as error:
                _told(f"{error}. It is compiled here")

    @functools.cached_property
    def other(self) -> CacheManager:
        try:
            return (self.before or FileCacheManager)(self.key, **self.how)
        except OSError as error:
            return self._elsewhere(error)

    def _elsewhere(self, error: OSError) -> CacheManager:
        """An entry in a folder of this process, where Triton's own cache has no room or may not be written."""
        if used is not None and used.writing:
            raise error
        path = error.filename or knobs.cache.dir
        _told(f"{path}: {error.strerror}: kernels that are compiled here are kept for this process only"
              " (TRITON_CACHE_DIR names a folder that can be written)")  # fmt: skip
        knobs.cache.dir = _writable()
        self.__dict__["other"] = FileCacheManager(self.key, **self.how)
        return self.__dict__["other"]

    def get_file(self, filename: str) -> str | None:
        return str(self.found[filename]) if filename in self.found else self.other.get_file(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if filename in self.found:
            return {name: str(path) for name, path in self.found.items()}
        return self.other.get_group(filename)

    def has_file(self, filename: str) -> bool:
        return self.get_file(filename) is not None

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        try:
            return self.other.put(data, filename, binary=binary)
        except OSError as error:
            return self._elsewhere(error).put(data, filename, binary=binary)

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        return self.other.put_group(filename, group)


def install(folder: Path, writing: bool = False) -> tuple[Use, Callable[[], None]]:
    """Read kernels from the folder, before Triton's own cache, and count; returns the counts, and what undoes it."""
    before = used, WarmedCacheManager.before, knobs.cache.manager_class, knobs.compilation.listener
    environment = os.environ.get("TRITON_CACHE_MANAGER")

    def set_to(use, behind, manager, listener) -> None:
        global used
        used, WarmedCacheManager.before = use, behind
        knobs.cache.manager_class, knobs.compilation.listener = manager, listener
        # Triton puts the manager into the environment, where processes that know nothing of us would find it
        os.environ.pop("TRITON_CACHE_MANAGER", None)
        if environment is not None:
            os.environ["TRITON_CACHE_MANAGER"] = environment

    def listener(*, src, metadata_group, cache_hit, **rest) -> None:
        if before[3] is not None:
            before[3](src=src, metadata_group=metadata_group, cache_hit=cache_hit, **rest)
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith("spectral_ops."):
            return
        if not cache_hit:
            use.compiled.append(src.name)
            logger.info("Triton kernel %s: not in %s, compiled here", src.name, folder)
        elif all(Path(path).is_relative_to(folder) for path in metadata_group.values()):
            use.hits += 1
        else:
            use.others += 1

    use = Use(folder, writing)
    behind = before[1] if before[2] is WarmedCacheManager else before[2]
    set_to(use, behind, WarmedCacheManager, listener)
    return use, functools.partial(set_to, *before)


_activating = threading.Lock()  # functools.cache lets several threads in


def activate() -> None:
    """Read kernels from the folder that ``SPECTRAL_OPS_TRITON_CACHE`` names, from now on, and log whether it fits; how
    many were found there is logged when the process ends."""
    with _activating:
        _activate()


@functools.cache
def _activate() -> None:
    folder = Path(os.environ[VARIABLE]).absolute()
    target = None
    if torch.cuda.is_available() and not torch.version.hip:
        target = int("{}{}".format(*torch.cuda.get_device_capability()))
    lines, fits = describe(folder, target)
    if fits:
        logger.info("Triton kernels come from %s: %s", folder, next(line for line in lines if line.endswith(": fits")))
    else:
        logger.warning("%s: no kernel can come from there, so they are compiled at first use: %s", VARIABLE, lines[-1])
    use, _ = install(folder)
    atexit.register(lambda: logger.info(str(use)))
