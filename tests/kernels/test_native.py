"""Host-side C++ internals, through the pybind11 module that CMake builds for the tests: generator, tiling, threads."""

from __future__ import annotations

import fcntl
import importlib.util
import random
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from spectral_ops.core import philox
from spectral_ops.functional import lowrank_routes

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "native"
ISAS = ("default", "avx2", "avx512", "avx512_bf16")


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def compiled_objects() -> list[Path]:
    """The kernels' objects as the extension was linked of; none where a source has changed since."""
    objects = sorted((ROOT / "build" / "cmake").glob("CMakeFiles/cpu_*.dir/**/*.o"))
    kinds = Counter(path.relative_to(ROOT / "build/cmake/CMakeFiles").parts[0] for path in objects)
    kernels = len(list((ROOT / "csrc" / "cpu").glob("*.cpp"))) - 1
    whole = kinds["cpu_isa.dir"] == 1 and kinds["cpu_baseline.dir"] == kernels
    sources = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "CMakeLists.txt"]
    changed = max(path.stat().st_mtime for path in sources)
    return objects if whole and changed < min(path.stat().st_mtime for path in objects) else []


@pytest.fixture(scope="session")
def native():
    missing = [n for n in ("cmake", "ninja") if tool(n) is None]
    missing += [n for n in ("pybind11",) if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"the native test module needs {', '.join(missing)}: pip install {' '.join(missing)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    configure = [tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", FOLDER, "-DSPECTRAL_OPS_NATIVE_TESTS=ON"]
    configure += [f"-DSPECTRAL_OPS_CPU_OBJECTS={';'.join(map(str, compiled_objects()))}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    with open(FOLDER / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool("cmake"), "--build", FOLDER, "--target", "spectral_ops_native_tests"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(FOLDER))
    try:
        import spectral_ops_native_tests
    finally:
        sys.path.remove(str(FOLDER))
    return spectral_ops_native_tests


@pytest.fixture(params=ISAS)
def isa(request, native):
    if request.param not in native.isas():
        pytest.skip(f"{request.param} does not run on this machine")
    return request.param


@pytest.mark.parametrize("seed", [0, 1, 2**61 + 12345, 2**62 - 1])
@pytest.mark.parametrize("first,count", [(0, 64), (1, 7), (3, 1), (130, 61), (2**34 - 6, 50)])
def test_philox_words(native, isa, seed, first, count):
    counters = torch.arange(first // 4, (first + count + 3) // 4)
    words = philox.philox(counters, torch.tensor([seed])).flatten()[first % 4 :][:count]
    assert native.philox(first, count, seed, isa) == words.tolist()


def test_philox_known_answer(native, isa):
    """The vectors published with Random123 (kat_vectors): counter 0, key 0."""
    assert native.philox(0, 4, 0, isa) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 5), (2, 2048), (7, 333), (4, 64)])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 1 - 2**-24, 1 - 2**-30])
def test_keep_mask(native, isa, rows, columns, p):
    seed = torch.tensor([123456789012345])
    wanted = philox.keep_mask(rows, columns, seed, p)
    assert torch.equal(torch.tensor(native.keep_mask(rows, columns, int(seed), p, isa, 0, rows)), wanted)
    begin, end = rows // 3, rows // 2 + 1  # a thread's share of the rows; it throws if anything else is written
    assert torch.equal(torch.tensor(native.keep_mask(rows, columns, int(seed), p, isa, begin, end)), wanted[begin:end])


@pytest.mark.parametrize("wanted", [64, 256])
@pytest.mark.parametrize("columns", [1, 48, 2048, 11008])
def test_period_copies(native, columns, wanted):
    for r in range(1, columns + 1) if columns <= 2048 else (1, 7, 64, 100, 1000, 1024, 1025, 11008):
        copies = native.period_copies(columns, r, wanted)
        assert copies >= 1
        assert copies == 1 or r * copies <= min(columns, native.max_tile)
        if r * 16 <= min(columns, native.max_tile):  # room enough: whole vectors, and at least half the period wanted
            assert r * copies % 8 == 0 and 2 * r * copies >= min(wanted, columns)


def test_grain_rows(native):
    for columns in (0, 1, 64, 4096, 10**6):
        assert native.grain_rows(columns, True) >= 1
        assert native.grain_rows(columns, False) >= native.grain_rows(columns, True)
    assert native.grain_rows(64, False) * 64 == 32768


def test_unknown_isa(native):
    with pytest.raises(ValueError, match="neon does not run here"):
        native.philox(0, 4, 0, "neon")


# --- the sparse kernels' plan ---

ROWS = {  # entries of each row
    "even": [12] * 300,
    "one dense row": [0] * 500 + [2048] + [0] * 99,
    "mostly empty": ([0] * 99 + [3]) * 20,
    "128,000 rows": [1 if o % 1000 == 0 else 0 for o in range(127_999)] + [4096],
    "one row": [7],
    "empty": [0] * 5,
    "no rows": [],
}


def offsets_of(counts):
    return [0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]


@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS)
def test_row_of_entry(native, counts):
    offsets = offsets_of(counts)
    for first in (0, 1000):  # a part of a larger matrix starts past 0
        wanted = [o for o, count in enumerate(counts) for _ in range(count)]
        for p in {0, 1, len(wanted) // 2, len(wanted) - 1} & set(range(len(wanted))):
            assert native.row_of_entry([first + o for o in offsets], first + p) == wanted[p]


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
@pytest.mark.parametrize("counts", ROWS.values(), ids=ROWS)
def test_rows_are_shared_out_by_their_entries(native, counts, parts):
    offsets = offsets_of(counts)
    begins = native.row_shares(offsets, parts)
    assert begins[0] == 0 and begins[-1] == len(counts) and begins == sorted(begins)
    cost = [offsets[q] - offsets[p] + q - p for p, q in zip(begins, begins[1:], strict=False)]
    assert max(cost) <= (offsets[-1] + len(counts)) / parts + 1 + max(counts, default=0) + 1


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
@pytest.mark.parametrize("nnz", [0, 1, 15, 16, 1000, 25_166])
def test_entries_are_shared_out_evenly(native, nnz, parts):
    begins = native.entry_shares(nnz, parts)
    assert begins[0] == 0 and begins[-1] == nnz and begins == sorted(begins)
    assert all(b % 16 == 0 for b in begins[:-1])
    assert max(q - p for p, q in zip(begins, begins[1:], strict=False)) <= nnz / parts + 32


@pytest.mark.parametrize("per_lane", [1, 2])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("columns", [1, 300, 2048, 11008, 128_000])
def test_slabs(native, columns, size, per_lane):
    for tokens in (0, 1, 2, 3, 16, 17, 100, 1024, 10**6):
        plan = native.slabs(tokens, columns, size, per_lane, 16)
        lanes, count, groups = plan["lanes"], plan["count"], plan["groups"]
        assert lanes in (4, 16, 32, 64) and lanes >= min(tokens, 16) // 4
        assert (count - 1) * lanes * per_lane < tokens <= count * lanes * per_lane or tokens == count == 0
        assert 1 <= groups <= max(min(count, 16), 1)
        assert plan["bytes"] == lanes * columns * size
        assert lanes <= 16 or plan["bytes"] <= 2**18  # what stays in a core's cache
    assert native.slabs(10**6, columns, size, per_lane, 3)["groups"] == 3


# --- the routes of lowrank_matmul ---


def test_both_languages_cost_a_route_alike(native):
    draw = random.Random(0)
    for _ in range(5000):
        size = [max(round(2 ** draw.uniform(0, 17)) + draw.choice((-1, 0, 0, 1)), 1) for _ in range(3)]
        r = draw.choice((0, 1, 8, 16, 17, 64, 200, 256))
        sizes = lowrank_routes.MatmulSizes(*size, r, *(draw.random() < 0.5 for _ in range(5)))
        seconds, fills, best = native.matmul_costs(*sizes)
        costs = lowrank_routes.matmul_costs(sizes)
        assert (*seconds, fills) == tuple(costs), sizes
        assert lowrank_routes.ROUTES[best] == costs.best(), sizes
