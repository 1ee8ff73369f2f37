"""Compile the Triton kernels of some methods into a folder, for GPUs that need not be here.

Compute nodes read them with SPECTRAL_OPS_TRITON_CACHE=DIR: the folder may have been copied, and may be read-only. They
need the same version of spectral_ops, the same triton and the same Python minor version.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_ops import _library, _loader, backends, tuning
from spectral_ops._table import table
from spectral_ops.bench import methods
from spectral_ops.triton_kernels import VARIABLE

DTYPES = {**methods.DTYPES, "float16": torch.float16}
# lengths after which launches of one kernel are split, and compiled, apart from those of another
TOKENS = (1, 2, 5, 16, 17, 64, 100, 200, 333, 512, 1000, 1024, 1500, 2048, 4096, 8192, 10000, 16384, 32768, 65536)


class Refused(Exception):
    """What was asked for cannot be done; the message is the one line that says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", required=True, metavar="sm_XX", help="of the nodes' GPUs: sm_90")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME",
                        help=f"all, or some of {', '.join(methods.METHODS)}")  # fmt: skip
    parser.add_argument("--operators", nargs="+", default=[], metavar="NAME",
                        help="operators besides, such as target_logprob, on their own sample arguments")  # fmt: skip
    parser.add_argument("--cache", metavar="DIR", default=os.environ.get(VARIABLE),
                        help=f"the folder, made or added to (default: ${VARIABLE})")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], metavar="DTYPE",
                        help=f"of the layers: some of {', '.join(DTYPES)} (default: bfloat16)")  # fmt: skip
    parser.add_argument("--adapter-dtype", nargs="+", choices=("float32", "same"), default=["float32"],
                        help="of the parameters; same: the layers' (default: float32, as PEFT makes them)")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b"], metavar="MODEL",
                        help=f"projections of {', '.join(methods.BLOCKS)} (default: llama3-8b)")  # fmt: skip
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("OUT", "IN"),
                        help="a layer's size, in place of --shapes; may be given several times")  # fmt: skip
    parser.add_argument("--bias", action="store_true", help="also layers with a bias")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS),
                        help="rows of a batch, batch size x length (default: a spread from 1 to 65536)")  # fmt: skip
    parser.add_argument("--rank", type=int, nargs="+", help="default: each method's usual one")
    parser.add_argument("--processors", type=int, nargs="+",
                        help="of the GPU, where it is a part of one (MIG) or not a usual card")  # fmt: skip
    parser.add_argument("--without-cuda-kernels", action="store_true",
                        help="also kernels of operators that have a CUDA kernel in this installation")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="kernels compiled at once")


def _some(option: str, given: list[str], known) -> list[str]:
    if "all" in given and option == "methods":
        return list(known)
    if unknown := [name for name in given if name not in known]:
        raise Refused(f"--{option}: got {unknown[0]!r}, wanted some of {', '.join(known)}")
    return list(dict.fromkeys(given))


def _checked(arguments: argparse.Namespace) -> None:
    """Raise Refused for arguments that mean nothing, and settle the rest."""
    if missing := backends.triton_missing():
        raise Refused(missing)
    if backends.interpreting():
        raise Refused("TRITON_INTERPRET is set: kernels are interpreted then, not compiled; unset it")
    os.environ.pop(VARIABLE, None)  # else launchers would read kernels from there, and say so
    if not arguments.cache:
        raise Refused("--cache: got none, wanted the folder for the compiled kernels")
    arguments.methods = _some("methods", arguments.methods, methods.METHODS)
    with_triton = [op.name for op in _library.OPERATORS.values() if backends.has_triton(op.stem, op.name)]
    arguments.operators = _some("operators", arguments.operators, sorted(with_triton))
    arguments.dtype = _some("dtype", arguments.dtype, DTYPES)
    arguments.shapes = _some("shapes", arguments.shapes, methods.BLOCKS)
    if not arguments.methods and not arguments.operators:
        raise Refused(f"--methods: got none, wanted all, or some of {', '.join(methods.METHODS)}")
    from spectral_ops.triton_kernels import aot

    known = [f"sm_{target}" for target in aot.TARGETS]
    asked = [re.sub(r"^(sm_?)?(\d+)a?$", r"sm_\2", name) for name in arguments.arch]
    arguments.targets = [int(name.removeprefix("sm_")) for name in _some("arch", asked, known)]
    for name in ("tokens", "rank", "processors"):
        if wrong := [n for n in getattr(arguments, name) or () if n < 1]:
            raise Refused(f"--{name}: got {wrong[0]}, wanted at least 1")
    if arguments.jobs < 1:
        raise Refused(f"--jobs: got {arguments.jobs}, wanted at least 1")
    if wrong := [size for size in arguments.shape or () if min(size) < 1]:
        raise Refused(f"--shape: got {wrong[0]}, wanted sizes of at least 1")


def _compiled_operators(arguments: argparse.Namespace) -> frozenset[str]:
    """The operators whose CUDA kernels run in place of Triton's; prints a line that says which."""
    extension = _loader.EXTENSIONS["cuda"]
    if arguments.without_cuda_kernels or extension.error:
        why = "--without-cuda-kernels" if arguments.without_cuda_kernels else extension.error
        print(f"for every operator that has a Triton kernel ({why})")
        return frozenset()
    print("for operators without a CUDA kernel in this installation (--without-cuda-kernels takes all)")
    chosen = {name for target in arguments.targets for name in _tuned(target)}  # and layers are then made of pieces
    layers = {name for name, layer in _library.LAYERS.items() if chosen.intersection(layer.pieces)}
    return extension.operators - chosen - layers


def _tuned(target: int) -> dict[str, set[str]]:
    """By operator the tiles that a table of measured choices for this architecture asks Triton for; "": the usual."""
    path = Path(tuning.FOLDER) / f"sm_{target}.json" if tuning.FOLDER else None
    found: dict[str, set[str]] = {}
    for name, dtypes in (tuning.read(path) if path else {}).items():
        choices = {one.choice.partition(":") for entry in dtypes.values() for one in entry.classes}
        if tiles := {tiles for backend, _, tiles in choices if backend == "triton"}:
            found[name] = tiles
    return found


@dataclass(frozen=True)
class Work:
    """One kernel to compile, for one method or operator."""

    name: str
    target: int
    launch: Any


@dataclass(frozen=True)
class Plan:
    """Everything to compile. Processes that compile are forked and find it here, since a launch cannot be pickled."""

    folder: Path
    temporary: Path
    host_functions: bool
    work: list[Work]


@dataclass(frozen=True)
class Done:
    """What became of one kernel: the bytes kept, 0 where it was there already; seconds; what went wrong."""

    index: int
    bytes: int
    seconds: float
    error: str = ""


_plan: Plan | None = None


@contextmanager
def _made_in(folder: Path) -> Iterator[None]:
    """Triton writes into the folder, which is emptied again: what is to stay was moved by then."""
    from triton import knobs

    folder.mkdir(exist_ok=True)
    knobs.cache.dir, knobs.compilation.store_binary_only = str(folder), True
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(index: int) -> Done:
    from spectral_ops.triton_kernels import aot, warmed

    began, work, own = time.monotonic(), _plan.work[index], _plan.temporary / str(os.getpid())
    with _made_in(own):
        try:
            with aot.compiling(work.target):
                kernel = aot.compiled(work.launch)
            if _plan.host_functions:
                aot.host_function(kernel)
        except OSError:
            raise
        except Exception as error:  # a kernel that this architecture does not take
            text = (str(error).strip() or "-").splitlines()[-1]
            return Done(index, 0, time.monotonic() - began, f"{type(error).__name__}: {text}")
        size = sum(warmed.keep(made, _plan.folder) for made in own.iterdir())
        return Done(index, size, time.monotonic() - began)


def _compile_all(jobs: int) -> list[Done]:
    numbers = range(len(_plan.work))
    if min(jobs, len(numbers)) == 1:
        return [_compile(i) for i in numbers]
    try:
        with ProcessPoolExecutor(min(jobs, len(numbers)), multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_compile, numbers))
    except BrokenProcessPool:  # multiprocessing.Pool would wait for it for ever
        raise Refused("a process that compiled was killed, by want of memory perhaps; run it again with fewer --jobs."
                      " Kernels that are there are whole") from None  # fmt: skip


def _record(arguments: argparse.Namespace, compiled: frozenset[str]) -> tuple[list[Work], dict[tuple, float]]:
    """What to compile, each kernel once, and the seconds that finding it took by (target, name)."""
    from spectral_ops.bench import launches
    from spectral_ops.triton_kernels import aot

    shapes = arguments.shape or list(dict.fromkeys(s for name in arguments.shapes for s in methods.BLOCKS[name]))
    dtypes = tuple(DTYPES[name] for name in arguments.dtype)
    sizes = launches.Sizes(
        tuple(dict.fromkeys(arguments.tokens)), tuple(map(tuple, shapes)), tuple(arguments.rank or [None]), dtypes,
        tuple(name == "float32" for name in arguments.adapter_dtype), (False, True) if arguments.bias else (False,),
    )  # fmt: skip
    work, seconds, seen = [], {}, set()
    for name in (*arguments.methods, *arguments.operators):
        began = time.monotonic()
        of_method = name in arguments.methods
        try:
            calls = list(launches.of_method(name, sizes, compiled) if of_method else launches.of_operator(name, sizes))
        except ValueError as error:  # sizes that a method does not take
            raise Refused(f"{name}: {str(error).splitlines()[-1]}") from None
        for target in arguments.targets:
            processors = tuple(arguments.processors or aot.TARGETS[target])
            with aot.compiling(target):
                found = launches.record(calls, target, processors, _tuned(target))
            work += [Work(name, target, launch) for key, launch in found.items() if (target, key) not in seen]
            seen.update((target, key) for key in found)
            seconds[target, name] = time.monotonic() - began
            began = time.monotonic()
    return work, seconds


def _prepare(folder: Path) -> Path:
    """Make the folder, say what is there that does not fit, and return a new folder in it for what is being made."""
    from spectral_ops.triton_kernels import warmed

    if folder.exists() and not folder.is_dir():
        raise Refused(f"--cache: got {folder}, which is a file, wanted a folder")
    try:
        there = warmed.manifest(folder)
    except ValueError as error:
        raise Refused(f"--cache: {error}") from None
    for run in there:
        if why_not := warmed.misfits(run):
            print(f"there already, and stays, for {run['arch']}, but of no use here: {'; '.join(why_not)}")
    folder.mkdir(parents=True, exist_ok=True)
    warmed.note(folder)
    temporary = folder / f".part{os.getpid()}"
    temporary.mkdir()
    return temporary


def _run(arguments: argparse.Namespace) -> int:
    from spectral_ops.triton_kernels import warmed

    global _plan
    began, folder = time.monotonic(), Path(arguments.cache).absolute()
    compiled = _compiled_operators(arguments)
    work, seconds = _record(arguments, compiled)
    if not work:
        raise Refused(
            f"nothing to compile: {' '.join(arguments.methods + arguments.operators)} launches no Triton kernel"
            + (" where CUDA kernels are (--without-cuda-kernels takes Triton's too)" if compiled else "")
        )
    temporary = _prepare(folder)
    _, undo = warmed.install(folder, writing=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.callback(undo)
        stack.enter_context(knobs_kept())
        host = _host_functions(stack, temporary, folder)
        print(f"{len(work)} kernels, {arguments.jobs} at once", flush=True)
        _plan = Plan(folder, temporary, host, work)
        done = _compile_all(arguments.jobs)
        for target in arguments.targets:
            named = {"methods": arguments.methods + arguments.operators, "dtypes": arguments.dtype}
            warmed.note(folder, warmed.identity(target) | named)
    print(_report(work, done, seconds))
    failed = [one for one in done if one.error]
    for one in failed:
        w = work[one.index]
        print(f"not compiled: {w.launch.kernel.__name__} of {w.name} for sm_{w.target}: {one.error}", file=sys.stderr)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"\n{folder}: {total / 2**20:.1f} MiB in all, {time.monotonic() - began:.0f} s")
    print(f"on the nodes: {VARIABLE}={folder}")
    return 1 if failed else 0


@contextmanager
def knobs_kept() -> Iterator[None]:
    """Triton's settings as they were, after."""
    from triton import knobs

    with knobs.cache.scope(), knobs.compilation.scope():
        yield


def _host_functions(stack: ExitStack, temporary: Path, folder: Path) -> bool:
    """Whether the C functions that launch kernels are built too: where a C compiler and Python's headers are."""
    from spectral_ops.triton_kernels import aot, warmed

    try:
        with _made_in(temporary / "host"):
            stack.enter_context(aot.host_functions())
            for made in (temporary / "host").iterdir():
                warmed.keep(made, folder)
        return True
    except (FileNotFoundError, subprocess.CalledProcessError, AttributeError, RuntimeError) as error:
        why = str(error).splitlines()[-1][:200]
        print(f"without the C functions that launch kernels, which the nodes then need a C compiler for: {why}")
        return False


def _report(work: list[Work], done: list[Done], seconds: dict[tuple, float]) -> str:
    rows = []
    for (target, name), recording in seconds.items():
        mine = [one for one in done if (work[one.index].target, work[one.index].name) == (target, name)]
        new = [one for one in mine if one.bytes]
        took = recording + sum(one.seconds for one in mine)
        there = sum(not one.bytes and not one.error for one in mine)
        rows.append(
            [f"sm_{target}", name, len(new), there, f"{sum(one.bytes for one in new) / 1024:.0f}", f"{took:.1f}"]
        )
    return table(["arch", "method", "new kernels", "there already", "KiB", "seconds"], rows)


def run(arguments: argparse.Namespace) -> int:
    """Compile; exit status 1 where a kernel failed, 2 where nothing could be done."""
    try:
        _checked(arguments)
        return _run(arguments)
    except Refused as refused:
        print(f"spectral-ops warmup: {refused}", file=sys.stderr)
    except OSError as error:
        where, reason = error.filename2 or error.filename or arguments.cache, error.strerror or error
        print(f"spectral-ops warmup: --cache: {where}: {reason}. Kernels that are there are whole: mend this and run it"
              " again", file=sys.stderr)  # fmt: skip
    return 2
