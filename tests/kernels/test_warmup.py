"""`python -m spectral_ops warmup`: what it compiles without a GPU is what a node looks up, and nothing else is needed.

The node is ``warmed_node.py``, another process that takes Triton's real way from a layer's call to the launch.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
from triton import knobs  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

if knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from spectral_ops import _library, triton_kernels, tuning  # noqa: E402
from spectral_ops.bench import launches, methods  # noqa: E402
from spectral_ops.cli import info, main, warmup  # noqa: E402
from spectral_ops.triton_kernels import aot, common, warmed  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NODE = Path(__file__).with_name("warmed_node.py")
ONE = ["--arch", "sm_90", "--methods", "bone", "--tokens", "96", "--shape", "256", "128", "--jobs", "1"]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert warmed.used is None and knobs.cache.manager_class is None and knobs.compilation.listener is None
    assert "TRITON_CACHE_MANAGER" not in os.environ and common.pretended is None


def warm(folder: Path, *arguments: str) -> int:
    return main(["warmup", *arguments, "--cache", str(folder)])


def node(folder: Path, own: Path, path: Path = ROOT, **asked) -> tuple[dict, str]:
    """What a process sees that launches for a GPU: its counts, and its log."""
    given = {"tokens": [96], "shape": [256, 128], "arch": 90, **asked}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "SPECTRAL_OPS"))}
    environment |= {"PYTHONPATH": str(path), "TRITON_CACHE_DIR": str(own), triton_kernels.VARIABLE: str(folder)}
    command = [sys.executable, "-P", str(NODE)] if sys.version_info >= (3, 11) else [sys.executable, str(NODE)]
    done = subprocess.run(
        [*command, json.dumps(given)], env=environment, cwd=own.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two kernels of Bone, compiled ahead."""
    made = tmp_path_factory.mktemp("warmed") / "cache"
    assert warm(made, *ONE) == 0
    return made


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def entries(folder: Path, kernel: str = "*.cubin") -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{kernel}"))


def test_a_node_finds_what_was_compiled(folder, tmp_path):
    """From another folder, read-only, by the package in another place, in another process: nothing is compiled, neither
    a kernel nor a C function, and nothing is written."""
    copied = shutil.copytree(folder, tmp_path / "shared" / "copied")
    shutil.copytree(ROOT / "spectral_ops", tmp_path / "site" / "spectral_ops")  # the link becomes a folder
    os.system(f"chmod -R a-w {copied}")
    seen, log = node(copied, tmp_path / "own", tmp_path / "site", methods=["bone"], tokens=[96, 4096])
    os.system(f"chmod -R u+w {copied}")
    assert seen["package"].startswith(str(tmp_path / "site"))
    assert seen["compiled"] == [] and seen["built"] == [] and seen["hits"] == 2 and seen["started"] >= 6
    assert not (tmp_path / "own").exists()
    assert f"Triton kernels come from {copied}: sm_90, bone, bfloat16" in log and "fits" in log
    assert f"INFO spectral_ops Triton kernels: 2 from {copied}, none compiled here" in log


def block_sum(dtype: torch.dtype) -> aot.Launch:
    with aot.recorded(90) as launches:
        x = torch.empty(96, 128, dtype=dtype, device="meta")
        triton_kernels.launcher("blocksum", "block_sum")(x, 64, None, None, 0.0)
    return launches[0]


def test_what_is_not_there_is_compiled(folder, tmp_path, caplog):
    """Into Triton's own cache, where the next process finds it; the log says which it was."""
    before = sorted(folder.rglob("*"))
    with knobs.cache.scope(), caplog.at_level(logging.INFO, "spectral_ops"):
        knobs.cache.dir = str(tmp_path)
        use, undo = warmed.install(folder)
        try:
            for dtype in (torch.bfloat16, torch.float16, torch.float16):
                with aot.compiling(90):
                    aot.compiled(block_sum(dtype))
        finally:
            undo()
    assert f"Triton kernel block_sum_kernel: not in {folder}, compiled here" in caplog.text
    assert str(use) == (
        f"Triton kernels: 1 from {folder}, 1 from Triton's own cache, 1 compiled here (block_sum_kernel)"
    )
    assert sorted(folder.rglob("*")) == before


def test_triton_alone_reads_the_folder_where_it_was_made(folder):
    """With TRITON_CACHE_DIR; it keeps absolute paths, which is why a copy needs a reader of ours."""
    hits = []
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.compilation.listener = lambda cache_hit, **rest: hits.append(cache_hit)
        knobs.cache.dir = str(folder)
        with aot.compiling(90):
            aot.compiled(block_sum(torch.bfloat16))
    assert hits == [True]


def test_keys_do_not_depend_on_what_ran_first():
    """Triton 3.6 hashes a kernel otherwise where one that it calls was hashed before."""
    kernels = {}
    for stem in ("float8", "dora", "lowrank"):
        module = importlib.import_module(f"spectral_ops.triton_kernels.{stem}")
        kernels |= {id(k): k for k in (*vars(module).values(), *vars(common).values()) if isinstance(k, JITFunction)}
    found = []
    for order in (("float8", "dora", "lowrank"), ("lowrank", "dora", "float8")):
        common._settled.clear()
        for kernel in kernels.values():
            kernel.hash, kernel.used_global_vals = None, {}
        for stem in order:
            triton_kernels.launcher(stem, "on_device")
        found.append({k.fn.__qualname__ + k.__module__: k.cache_key for k in kernels.values()})
    assert len(found[0]) > 20 and found[0] == found[1]


def test_again_it_compiles_nothing(copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.cubin")}
    assert warm(copy, *ONE) == 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.cubin")} == before
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("sm_90"))
    assert row[:4] == ["sm_90", "bone", "0", "2"]
    assert len(warmed.manifest(copy)) == 1


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "a file"])
def test_a_broken_entry_is_compiled_anew(copy, tmp_path, caplog, damage):
    """The node says which and goes on; warmup mends it, and leaves nothing of it."""
    entry = entries(copy, "block_sum_kernel.cubin")[0]
    kernel = entry / "block_sum_kernel.cubin"
    whole = kernel.read_bytes()
    if damage == "truncated":
        kernel.write_bytes(whole[:100])
    elif damage == "garbage":
        (entry / warmed.CONTENTS).write_text("{")
    elif damage == "missing":
        kernel.unlink()
    else:
        shutil.rmtree(entry)
        entry.write_text("")
    with pytest.raises(ValueError, match="delete it") as said:
        warmed.files(entry)
    assert "\n" not in str(said.value) and str(entry) in str(said.value)
    assert warm(copy, *ONE) == 0
    assert str(said.value) in caplog.text
    assert warmed.files(entry)["block_sum_kernel.cubin"].read_bytes() == whole
    assert {path.name for path in copy.iterdir() if path.name.startswith(".")} == set()


REFUSED = {
    "arch": (["--arch", "sm_70", "--methods", "bone"], "--arch: got 'sm_70', wanted some of sm_80, sm_86"),
    "no arch": (["--arch", "hopper", "--methods", "bone"], "--arch: got 'hopper', wanted"),
    "method": (["--arch", "sm_90", "--methods", "bone", "qlora"], "--methods: got 'qlora', wanted some of lora"),
    "none": (["--arch", "sm_90"], "--methods: got none, wanted all, or some of lora"),
    "operator": (["--arch", "sm_90", "--operators", "mm"], "--operators: got 'mm', wanted some of bat_"),
    "dtype": (["--arch", "sm_90", "--methods", "bone", "--dtype", "int8"], "--dtype: got 'int8', wanted some of"),
    "model": (["--arch", "sm_90", "--methods", "bone", "--shapes", "gpt"], "--shapes: got 'gpt', wanted some of"),
    "tokens": ([*ONE, "--tokens", "0"], "--tokens: got 0, wanted at least 1"),
    "size": ([*ONE, "--rank", "999"], "bone: BoneConfig.r: got 999"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(case, tmp_path, capsys):
    arguments, said = REFUSED[case]
    assert warm(tmp_path / "cache", *arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("spectral-ops warmup: ") and said in line and line.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_nothing_to_compile(tmp_path, capsys, monkeypatch):
    from spectral_ops import _loader

    served = _loader.Extension("spectral_ops._C_cuda", frozenset(["bone_linear_forward", "bone_linear_backward"]), None)
    monkeypatch.setitem(_loader.EXTENSIONS, "cuda", served)
    assert warm(tmp_path / "cache", *ONE) == 2
    assert "nothing to compile: bone launches no Triton kernel where CUDA kernels are" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "cache").write_text("")
    assert warm(tmp_path / "cache", *ONE) == 2
    assert capsys.readouterr().err.endswith("which is a file, wanted a folder\n")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9, "runs": []}', '{"version": 1, "runs": [{}]}', None])
def test_a_folder_that_is_not_one_of_ours(copy, capsys, text):
    """Neither written into nor read silently; ``info`` says what it is."""
    if text is None:
        (copy / warmed.MANIFEST).unlink()
    else:
        (copy / warmed.MANIFEST).write_text(text)
    before = sorted(copy.rglob("*"))
    assert warm(copy, *ONE) == 2
    line = capsys.readouterr().err
    assert f"{copy / warmed.MANIFEST}: " in line and "wanted" in line or "delete it" in line
    assert line.count("\n") == 1 and sorted(copy.rglob("*")) == before
    lines, fits = warmed.describe(copy)
    assert not fits and len(lines) == 1 and str(copy / warmed.MANIFEST) in lines[0]


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """What fits stays and is whole; of the rest there is nothing."""
    kept, real = [], warmed.keep

    def keep(made, folder):
        if kept:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made))
        kept.append(made.name)
        return real(made, folder)

    monkeypatch.setattr(warmed, "keep", keep)
    assert warm(tmp_path / "cache", *ONE) == 2
    line = capsys.readouterr().err
    assert "No space left on device" in line and line.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([warmed.MANIFEST, *kept])
    assert all(warmed.files(tmp_path / "cache" / name) for name in kept)


def test_a_process_that_is_killed(tmp_path, capsys, monkeypatch):
    """As by a login node that is short of memory: one line, and nothing waits."""
    here, compiled = os.getpid(), aot.compiled
    kill = lambda launch: compiled(launch) if os.getpid() == here else os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    monkeypatch.setattr(aot, "compiled", kill)
    assert warm(tmp_path / "cache", *ONE[:-1], "2") == 2
    line = capsys.readouterr().err
    assert "a process that compiled was killed" in line and "fewer --jobs" in line and line.count("\n") == 1
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == []


def test_no_permission_to_write(tmp_path, capsys, monkeypatch):
    (tmp_path / "shared").mkdir()
    make = os.mkdir

    def mkdir(path, *arguments):  # a mode would not keep root out
        if Path(path).is_relative_to(tmp_path / "shared"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert warm(tmp_path / "shared" / "cache", *ONE) == 2
    line = capsys.readouterr().err
    assert "Permission denied" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"triton": "3.5.1"}, "does not fit: triton 3.5.1, here 3"),
        ({"python": "3.9"}, "does not fit: python 3.9, here 3"),
        ({"compiler": "0"}, "does not fit: another build of triton"),
        ({"kernels": "0", "spectral_ops": "0.0.9"}, "does not fit: kernels of spectral_ops 0.0.9, here others of"),
        ({"environment": {"DISABLE_PTXAS_OPT": "true"}}, "does not fit: Triton's environment"),
        ({}, ": fits"),
    ],
)
def test_a_folder_of_another_version(copy, capsys, monkeypatch, changed, said):
    """``info`` says so, and so does warmup, which leaves it there and adds its own."""
    path = copy / warmed.MANIFEST
    data = json.loads(path.read_text())
    data["runs"][0] |= changed
    path.write_text(json.dumps(data))
    monkeypatch.setenv(triton_kernels.VARIABLE, str(copy))
    (first, line) = info.warmed()
    assert str(copy) in first and said in line and "sm_90, bone, bfloat16, by spectral_ops" in line
    assert warmed.describe(copy)[1] == (not changed)
    assert warm(copy, *ONE) == 0
    assert ("of no use here" in capsys.readouterr().out) == bool(changed)
    assert warmed.describe(copy)[1] and len(warmed.manifest(copy)) == 1 + bool(changed)


def test_a_gpu_that_nothing_was_warmed_for(folder):
    lines, fits = warmed.describe(folder, 80)
    assert not fits and lines[0].endswith("does not fit: this GPU is sm_80")
    assert warmed.describe(folder, 90)[1]


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_of_triton_s_own_that_cannot_be_written(folder, tmp_path, caplog, monkeypatch, full):
    """A miss is compiled for this process alone: where there is no folder to be had, and where its disk is full."""
    (tmp_path / "file").write_text("")
    real = warmed.FileCacheManager.put

    def put(self, *args, **kwargs):
        if str(tmp_path) in self.cache_dir:
            raise OSError(errno.ENOSPC, "No space left on device", self.cache_dir)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(warmed.FileCacheManager, "put", put)
    warmed._told.cache_clear()
    use, undo = warmed.install(folder)
    try:
        with knobs.cache.scope(), caplog.at_level(logging.WARNING, "spectral_ops"):
            knobs.cache.dir = str(tmp_path / "cache" if full else tmp_path / "file" / "cache")
            manager = warmed.WarmedCacheManager("A" * 52)
            kept = Path(manager.put(b"1", "one.cubin"))
            assert kept.read_bytes() == b"1" and not kept.is_relative_to(folder)
    finally:
        undo()
        shutil.rmtree(warmed._writable())
        warmed._writable.cache_clear()
    assert "kernels that are compiled here are kept for this process only" in caplog.text


def test_the_variable_names_no_folder(tmp_path, caplog, monkeypatch):
    """One warning, also where several threads launch first."""
    monkeypatch.setenv(triton_kernels.VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setattr(warmed, "install", lambda folder: (warmed.Use(folder), None))
    monkeypatch.setattr(warmed.atexit, "register", lambda call: None)
    real = warmed.describe
    monkeypatch.setattr(warmed, "describe", lambda *given: time.sleep(0.1) or real(*given))
    warmed._activate.cache_clear()
    threads = [threading.Thread(target=warmed.activate) for _ in range(4)]
    try:
        for act in (threading.Thread.start, threading.Thread.join):
            list(map(act, threads))
    finally:
        warmed._activate.cache_clear()
    line = "SPECTRAL_OPS_TRITON_CACHE: no kernel can come from there, so they are compiled at first use: "
    assert caplog.messages == [f"{line}{tmp_path / 'nowhere'}: no such folder"]
    assert not (tmp_path / "nowhere").exists()


def recorded(calls, processors=(132,), tiles=None) -> dict:
    with aot.compiling(90):
        return launches.record(calls, 90, processors, tiles or {})


def test_a_table_of_measured_choices_is_followed(tmp_path, monkeypatch):
    operator = _library.OPERATORS["lowrank_backward"]
    arguments = (None,) * len(operator.default._schema.arguments)
    classes = tuple(tuning.Class(arguments, choice, {}) for choice in ("triton:short", "reference"))
    table = {operator.name: {"bfloat16": tuning.Entry("nobody", classes)}}
    (tmp_path / "sm_90.json").write_text(tuning.text(table))
    monkeypatch.setattr(tuning, "FOLDER", str(tmp_path))
    assert warmup._tuned(90) == {"lowrank_backward": {"short"}} and warmup._tuned(80) == {}
    calls = list(launches.of_method("lora", launches.Sizes((4096,), ((1024, 1024),))))
    usual, tuned = recorded(calls), recorded(calls, tiles=warmup._tuned(90))
    assert usual.keys() < tuned.keys()


@pytest.mark.parametrize("method", ["bone", pytest.param("dora", marks=pytest.mark.slow)])
def test_the_usual_lengths_stand_for_all_others(method):
    """What a launch is compiled for goes by its sizes' divisibility, and by how far it is split: 12 other numbers of
    tokens need no kernel that the default ones do not."""
    draw, shapes = random.Random(0), ((1024, 4096),)
    others = tuple(int(2 ** draw.uniform(0, 16)) for _ in range(12))
    usual = recorded(launches.of_method(method, launches.Sizes(warmup.TOKENS, shapes)), aot.TARGETS[90])
    needed = recorded(launches.of_method(method, launches.Sizes(others, shapes)))
    assert needed and needed.keys() <= usual.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_its_launches(method):
    sizes = launches.Sizes((64,), ((512, 512),))
    assert len(recorded(launches.of_method(method, sizes))) >= 2


@pytest.mark.slow
def test_a_training_step_compiles_nothing(tmp_path):
    """Bat, whose launches differ most between forward and backward."""
    some, sizes = ["bat"], ["--tokens", "96", "--shape", "256", "128", "--rank", "16"]
    assert warm(tmp_path / "cache", "--arch", "sm_100", "--methods", *some, *sizes) == 0
    seen, log = node(tmp_path / "cache", tmp_path / "own", methods=some, rank=16, arch=100, dropout=0.1)
    assert seen["compiled"] == [] and seen["built"] == [] and seen["hits"] > 2, log
