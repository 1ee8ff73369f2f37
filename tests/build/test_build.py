"""The build: what a wheel holds, what loads, what is refused, and every instruction set."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from spectral_ops import _library, _loader, _version, backends

ROOT = Path(__file__).resolve().parents[2]
BUILT = _loader.EXTENSIONS["cpu"]
needs_build = pytest.mark.skipif(bool(BUILT.error), reason=f"_C is not loaded: {BUILT.error}")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command, check: bool = True, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SPECTRAL_OPS_") and k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**inherited, **env})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def python(code: str, **env) -> str:
    return run(sys.executable, "-c", code, **env).stdout.strip()


def python_with(installed: Path, code: str) -> str:
    """Run code on the package in ``installed`` alone: an editable install would lend it this checkout's extensions."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    return python(hide + code, PYTHONPATH=str(installed), cwd=installed)


def build_wheel(folder: Path, root: Path = ROOT, **env) -> Path:
    """`pip wheel .`; the compiled part is up to date already, so this packs."""
    for module in ("setuptools", "wheel", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel needs {module}: pip install {module}")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, root, **env)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if BUILT.error:
        pytest.skip(f"_C is not loaded: {BUILT.error}")
    return build_wheel(tmp_path_factory.mktemp("wheel"), SPECTRAL_OPS_SKIP_CUDA_BUILD="1")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("pure"), SPECTRAL_OPS_SKIP_BUILD="1")


# --- setuptools: any from 64 ---


@pytest.fixture(scope="module")
def old_setuptools(tmp_path_factory) -> Path:
    """A folder with the setuptools that this Python's venv would bring, which is older than 77 up to Python 3.11."""
    import ensurepip

    wheels = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("setuptools-*.whl"))
    if not wheels:
        pytest.skip("this Python brings no setuptools")
    folder = tmp_path_factory.mktemp("setuptools")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    return folder


def old_python(setuptools: Path, folder: Path, *command: str, check: bool = True, path: str = "") -> str:
    """``setup.py command`` by the bare interpreter, which then sees no package but this setuptools and torch."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "spectral_ops", "triton_kernels"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    env = {"PYTHONPATH": str(setuptools), "PATH": path, "SETUPTOOLS_USE_DISTUTILS": "local"}
    if check:
        env["SPECTRAL_OPS_SKIP_BUILD"] = "1"
    bare = (sys._base_executable, "-S", "-W", "ignore", "setup.py", "-q", *command)
    done = run(*bare, cwd=folder, check=check, **env)
    assert check or done.returncode == 1
    return done.stdout + done.stderr


def test_metadata_by_an_old_setuptools(old_setuptools, tmp_path):
    old_python(old_setuptools, tmp_path, "egg_info", "-e", str(tmp_path))
    text = (tmp_path / "spectral_ops.egg-info" / "PKG-INFO").read_text()
    assert f"Version: {_version.RELEASE}.dev0\n" in text  # no git there
    assert re.search(r"^License(-Expression)?: Apache-2.0$", text, re.M)


def test_what_the_build_lacks_is_named_with_the_command(old_setuptools, tmp_path):
    text = old_python(old_setuptools, tmp_path, "bdist_wheel", check=False)
    assert re.search(
        r"^spectral_ops: cmake and ninja\b.* not found; run: pip install cmake ninja( wheel)?; ", text, re.M
    )
    alone = old_python(old_setuptools, tmp_path, "build_ext", check=False)
    assert "run: pip install cmake ninja;" in alone  # wheel packs, it does not compile


# --- wheels ---


@pytest.mark.slow
def test_wheel_contents(wheel):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert version.startswith(_version.RELEASE)  # with .dev0 and the commit, but at a tag
    assert {n.split("/")[0] for n in names} == {"spectral_ops", f"spectral_ops-{version}.dist-info"}
    assert [n for n in names if n.endswith(".so")] == ["spectral_ops/_C.abi3.so"]
    for source in ROOT.glob("triton_kernels/*.py"):  # real files, although the tree has a link there
        assert f"spectral_ops/triton_kernels/{source.name}" in names
    for source in ROOT.glob("spectral_ops/functional/*.py"):
        assert f"spectral_ops/functional/{source.name}" in names
    metadata = (wheel.parent / f"installed/spectral_ops-{version}.dist-info/METADATA").read_text()
    for line in (f"Version: {version}", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert line in metadata
    assert "Requires-Dist: torch>=2.10.dev0\n" in metadata
    scripts = (wheel.parent / f"installed/spectral_ops-{version}.dist-info/entry_points.txt").read_text()
    assert "spectral-ops = spectral_ops.cli:main" in scripts


@pytest.mark.slow
def test_library_names_no_place_on_this_machine(wheel):
    library = wheel.parent / "installed/spectral_ops/_C.abi3.so"
    data = library.read_bytes()
    for place in (ROOT, Path(torch.__file__).parent, sys.prefix, Path.home()):
        assert str(place).encode() not in data
    if tool("readelf"):
        dynamic = run(tool("readelf"), "-d", library).stdout
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
        assert "libtorch_cpu.so" in needed and not any("python" in n for n in needed)


@pytest.mark.slow
def test_abi3audit(wheel):
    if importlib.util.find_spec("abi3audit") is None:
        pytest.skip("abi3audit is not installed: pip install abi3audit")
    report = json.loads(run(sys.executable, "-m", "abi3audit", "--strict", "--report", wheel).stdout)
    (spec,) = report["specs"].values()
    assert spec["wheel"], report
    for extension in spec["wheel"]:
        assert extension["result"]["is_abi3"] and not extension["result"]["non_abi3_symbols"]


@pytest.mark.slow
def test_wheel_runs(wheel):
    code = "import spectral_ops as s, torch; print(s.__file__); print(s.explain('block_sum', torch.ones(1)).backend)"
    installed = wheel.parent / "installed"
    where, backend = python_with(installed, code).splitlines()
    assert Path(where).is_relative_to(installed)
    assert backend == "cpu"


@pytest.mark.slow
def test_pure_wheel(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(pure_wheel).namelist() if n.endswith(".so")]
    code = (
        "import spectral_ops as s, torch; from spectral_ops import _loader; print(s.__file__);"
        "print(_loader.EXTENSIONS['cpu'].error); print(s.explain('block_sum', torch.ones(1)).backend);"
        "print(s.block_sum(torch.arange(6.0).reshape(1, 6), 2).tolist())"
    )
    installed = pure_wheel.parent / "installed"
    where, error, backend, h = python_with(installed, code).splitlines()
    assert Path(where).is_relative_to(installed)
    assert "_C is not in this wheel (`pip install" in error and backend == "reference" and h == "[[6.0, 9.0]]"


@pytest.mark.slow
def test_a_checkout_without_links_installs_and_says_what_is_wrong(tmp_path):
    """git writes the text "../triton_kernels" where a system has no symbolic links."""
    checkout = tmp_path / "checkout"
    for folder in ("spectral_ops", "triton_kernels"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    shutil.rmtree(checkout / "spectral_ops/triton_kernels")
    (checkout / "spectral_ops/triton_kernels").write_text("../triton_kernels")
    with pytest.raises(AssertionError, match="checkout without symbolic links"):
        python_with(checkout, "import spectral_ops")
    installed = build_wheel(tmp_path, checkout, SPECTRAL_OPS_SKIP_BUILD="1").parent / "installed"
    code = "import spectral_ops; from spectral_ops import triton_kernels; print(triton_kernels.__file__)"
    assert python_with(installed, code) == str(installed / "spectral_ops/triton_kernels/__init__.py")


@pytest.mark.slow
def test_stale_extension_is_refused(wheel, tmp_path):
    shutil.copytree(wheel.parent / "installed", tmp_path / "installed")
    source = tmp_path / "installed/spectral_ops/functional/blocksum.py"
    text = source.read_text()
    assert text.count('"block_sum(Tensor x, int r, Tensor? offsets, Tensor? seed, float p) -> Tensor"') == 1
    source.write_text(text.replace("Tensor? seed, float p) -> Tensor", "Tensor? seed, float q) -> Tensor"))
    code = (
        "import spectral_ops as s, torch; from spectral_ops import _loader; e = _loader.EXTENSIONS['cpu'];"
        "print(e.error); print(sorted(e.operators)); print(s.explain('block_sum', torch.ones(1)).backend);"
        "print(s.block_sum(torch.ones(1, 6), 2).tolist())"
    )
    output = python_with(tmp_path / "installed", code)
    error, operators, backend, h = output.splitlines()
    assert "was built for operator schemas" in error and "pip install --force-reinstall" in error
    assert operators == "[]" and backend == "reference" and h == "[[3.0, 3.0]]"


# --- the loaded extension ---


@needs_build
def test_extension_attributes():
    from spectral_ops import _C

    assert _C.schema_hash == _library.schema_hash()
    assert {"block_sum", "block_tile_"} <= set(_C.operators) <= {*_library.OPERATORS, *_library.LAYERS}
    assert _C.isa() in ("default", "avx2", "avx512", "avx512_bf16")
    assert "torch 2." in _C.build_info and _C.build_info in BUILT.info
    _C.register()  # a second time changes nothing
    assert backends.explain("block_sum", torch.ones(1)).backend == "cpu"


@needs_build
def test_every_operator_has_its_source_listed():
    """No source is forgotten in CMakeLists.txt, by name or by pattern."""
    listed = re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    built = {source for pattern in listed for source in ROOT.glob(pattern)}
    for pattern in ("csrc/**/*.cpp", "csrc/**/*.cu"):
        for source in ROOT.glob(pattern):
            assert source in built, f"{source.name} is not built"


DIGEST = """
import hashlib, torch, spectral_ops
from spectral_ops import _C, _library
sums, tiles = (_library.OPERATORS[n].default for n in ("block_sum", "block_tile_"))
generator, digest = torch.Generator().manual_seed(0), hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for k, r in ((2048, 64), (1000, 33), (515, 1), (3000, 1500), (64, 64)):
        for seed in (None, torch.tensor([2**61 + 7])):
            for offsets in (None, torch.linspace(0, k, r + 1).int()):
                x = torch.randn(3, k, generator=generator).to(dtype)
                h = sums(x, r, offsets, seed, 0.3)
                tiles(x, h, offsets, seed, 0.3, True)
                for t in (h, x):
                    digest.update(t.double().numpy().tobytes())
print(_C.isa(), digest.hexdigest())
"""


@needs_build
@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits():
    best, wanted = python(DIGEST).split()
    order = ["default", "avx2", "avx512", "avx512_bf16"]
    for isa in order:
        active, digest = python(DIGEST, SPECTRAL_OPS_CPU_ISA=isa).split()
        assert active == order[min(order.index(isa), order.index(best))]  # a cap, not a wish
        assert digest == wanted, f"{isa} and {best} differ"


@needs_build
@pytest.mark.slow
def test_unknown_instruction_set_is_named():
    code = "import spectral_ops; from spectral_ops import _loader; print(_loader.EXTENSIONS['cpu'].error)"
    assert "wanted avx512_bf16, avx512, avx2 or default" in python(code, SPECTRAL_OPS_CPU_ISA="sse9")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs tests/kernels/sanitized.py on _C as built with both sanitizers."""
    compiler = tool(os.environ.get("CXX", "g++"))
    runtimes = (
        [run(compiler, f"-print-file-name=lib{n}.so").stdout.strip() for n in ("asan", "ubsan")] if compiler else []
    )
    if not runtimes or not all(Path(r).is_absolute() for r in runtimes):
        pytest.skip("needs gcc's libasan and libubsan")
    for name in ("cmake", "ninja"):
        if tool(name) is None:
            pytest.skip(f"{name} is not on PATH")
    folder = tmp_path_factory.mktemp("sanitized")
    settings = {"SPECTRAL_OPS_SANITIZE": "address,undefined", "SPECTRAL_OPS_SKIP_CUDA_BUILD": "1"}
    run(sys.executable, "setup.py", "build_ext", "--build-lib", folder, **settings)

    def call(*arguments, check=True, **env):
        env |= {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
        script, library = ROOT / "tests/kernels/sanitized.py", folder / "spectral_ops/_C.abi3.so"
        return run(sys.executable, script, library, *arguments, check=check, PYTHONPATH=str(ROOT), **env)

    return call


@needs_build
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("isa", "dtype"),
    [("default", "float64"), ("avx2", "float16"), ("avx512", "float32"), ("avx512_bf16", "bfloat16")],
)
def test_kernels_run_clean_under_sanitizers(sanitized, isa, dtype):
    """One dtype an instruction set; `make sanitize` runs them all."""
    assert "clean: " in sanitized(dtype, SPECTRAL_OPS_CPU_ISA=isa).stdout


@needs_build
@pytest.mark.thorough
def test_sanitizers_see_what_the_kernels_read(sanitized):
    done = sanitized("overrun", check=False)
    assert done.returncode and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stdout + done.stderr


@needs_build
@pytest.mark.skipif(tool("nm") is None, reason="needs nm (binutils)")
def test_kernels_share_no_inline_function_across_instruction_sets():
    """The linker keeps one copy of an inline function: an AVX-512 one would crash an older processor."""
    objects = [
        o
        for isa in ("avx2", "avx512", "avx512_bf16")
        for o in (ROOT / "build/cmake").glob(f"CMakeFiles/cpu_{isa}.dir/**/*.o")
    ]
    if not objects:
        pytest.skip("no build folder beside this checkout")
    for path in objects:
        isa = path.relative_to(ROOT / "build/cmake").parts[1].removeprefix("cpu_").removesuffix(".dir")
        for line in run(tool("nm"), "-C", path).stdout.splitlines():
            kind, name = line[17:18], line[19:]
            assert kind not in "WVu" or f"spectral_ops::cpu::{isa}::" in name, f"{path.name}: {name} could be shared"


# --- numbers ---


def layouts(rows: int, columns: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(columns)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    yield "contiguous", draw(rows, columns)
    yield "padded", draw(rows, columns + 3)[:, 1 : columns + 1]
    yield "transposed", draw(columns, rows).t()
    yield "expanded", draw(1, columns).expand(rows, columns)


@needs_build
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("shape", [(4, 2048, 64), (7, 1000, 33), (3, 515, 1), (2, 3000, 1500), (2, 5, 9), (0, 8, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_block_sum_kernels(dtype, shape, runs, dropout):
    rows, k, r = shape
    seed = torch.tensor([2**61 + 12345]) if dropout else None
    offsets = None
    if runs:  # some of them empty
        cuts = torch.randint(0, k + 1, (r - 1,), generator=torch.Generator().manual_seed(r)).sort().values
        offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([k])]).int()
    close = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    sums, tiles = (_library.OPERATORS[n] for n in ("block_sum", "block_tile_"))
    for name, x in layouts(rows, k, dtype):
        h = sums.default(x, r, offsets, seed, 0.3)
        assert h.dtype == dtype
        torch.testing.assert_close(h.double(), sums.reference(x.double(), r, offsets, seed, 0.3), **close, msg=name)
        if name == "expanded" and rows > 1:
            with pytest.raises(RuntimeError, match="out: is expanded"):
                tiles.default(x, h, offsets, seed, 0.3, True)
            continue
        for accumulate in (False, True):
            wanted = x.double()
            tiles.reference(wanted, h.double(), offsets, seed, 0.3, accumulate)
            tiles.default(x, h, offsets, seed, 0.3, accumulate)
            torch.testing.assert_close(x.double(), wanted, **close, msg=name)


@needs_build
def test_kernel_checks():
    sums, tiles = (_library.OPERATORS[n].default for n in ("block_sum", "block_tile_"))
    x, s = torch.ones(2, 8), torch.ones(2, 4)
    for message, call in {
        "x: got 1 dimensions": lambda: sums(x[0], 2, None, None, 0.0),
        "x: got scalar type": lambda: sums(x.int(), 2, None, None, 0.0),
        "r: got 0": lambda: sums(x, 0, None, None, 0.0),
        "seed: wanted int64": lambda: sums(x, 2, None, torch.ones(1), 0.5),
        "offsets: got 2 elements": lambda: sums(x, 2, torch.tensor([0, 8]).int(), None, 0.0),
        "offsets: got a range of 0 to 9": lambda: sums(x, 2, torch.tensor([0, 4, 9]).int(), None, 0.0),
        "offsets: decreases": lambda: sums(x, 3, torch.tensor([0, 6, 4, 8]).int(), None, 0.0),
        "s: got size 2 in dimension 0, wanted 1": lambda: tiles(x[:1], s, None, None, 0.0, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
