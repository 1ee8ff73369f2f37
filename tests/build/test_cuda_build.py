"""The CUDA extension, built once without a GPU for three generations: no spills, no warnings, and what must be
tensor-core or 16-byte instructions is. What the kernels compute is tested in test_cuda_host.py.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from sources import copy_of_sources

from benchmarks.estimates import cases, lowrank, sass, table
from benchmarks.estimates.launches import Launch
from benchmarks.estimates.model import estimate
from deploy import archive, audit, repair, wheel

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHS = ("9.0a",)
EVERY_ARCH = ("8.0", "9.0a", "10.0a")
INSTRUCTIONS = {  # as they show in SASS
    "HMMA": r"\bHMMA\.",  # warp matrix product
    "HGMMA by rows": r"\bHGMMA\.64x64x16\.F32\S* R\d+, gdesc\[UR\d+\]\.tnspB",  # a warpgroup's; A as it is stored,
    "HGMMA by columns": r"\bHGMMA\.64x64x16\.F32\S* R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB",  # or transposed
    "HGMMA of 256": r"\bHGMMA\.64x256x16\.F32",  # a warpgroup's widest product;
    "HGMMA of 256, turned": r"\bHGMMA\.64x256x16\.F32\S* R\d+, gdesc\[UR\d+\]\.tnspB",  # B stored by columns
    "HGMMA of no descriptor": r"\bHGMMA\..*gdesc\[URZ\]",
    "TMA load": r"\bUTMALDG\.2D(?!\S*\.MULTICAST)",
    "TMA multicast": r"\bUTMALDG\.2D\S*\.MULTICAST",
    "TMA store": r"\bUTMASTG\.2D",
    "registers moved": r"\bUSETMAXREG\b",  # between a block's warpgroups
    "STSM": r"\bSTSM\.",  # 8x8 matrices to shared memory
    "cluster barrier": r"\bUCGABAR_ARV\b",
    "MOVM": r"\bMOVM\.",  # 8x8 transpose
    "LDG": r"\bLDG\.E",
    "STG": r"\bSTG\.E",
    "LDG64": r"\bLDG\.E\S*\.64\b",
    "LDSM": r"\bLDSM\.",  # 8x8 matrices from shared memory
    "LDG128": r"\bLDG\.E\S*\.128\b",
    "STG128": r"\bSTG\.E\S*\.128\b",
    "LDGSTS128": r"\bLDGSTS\.E\S*\.128\b",  # asynchronous copy
    "LDS128": r"\bLDS\.128\b",
    "F2F": r"\bF2F\b",  # conversion of one value
    "LDS narrow": r"\bLDS\b(?!\.128)",
    "SHFL apart": r"\bENDCOLLECTIVE\b",  # once more for warps whose lanes have parted
    "local": r"\b(?:LDL|STL)\b",
    "atomic": r"(?<!\.)\b(?:RED|ATOM|ATOMS|ATOMG)\b",  # an mbarrier's SYNCS.ARRIVE.….RED is none
}

LINE = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?(HGMMA[^;]*|[A-Z][\w.]*)")  # operands matter of a warpgroup's products alone

pytestmark = pytest.mark.slow


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(name: str, archs: tuple[str, ...]) -> Path:
    """A CMake folder with _C_cuda, which takes minutes; ninja keeps what is up to date."""
    for needed in ("nvcc", "cmake", "ninja"):
        if tool(needed) is None:
            pytest.skip(f"{needed} is not on PATH")
    folder = ROOT / "build" / name
    settings = ["-DSPECTRAL_OPS_CUDA=ON", f"-DSPECTRAL_OPS_CUDA_ARCHS={' '.join(archs)}"]
    settings += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *settings)
    run(tool("cmake"), "--build", folder, "--target", "_C_cuda", "--parallel", "2")
    return folder


@pytest.fixture(scope="module")
def nvcc_build():
    return build("nvcc", ARCHS)


def test_every_kernel_compiles_without_spills(nvcc_build):
    no_spills(nvcc_build, ARCHS)


@pytest.mark.thorough
def test_every_kernel_compiles_without_spills_for_every_generation():
    no_spills(build("nvcc-every", EVERY_ARCH), EVERY_ARCH)


def no_spills(folder: Path, archs: tuple[str, ...]) -> None:
    for source in SOURCES.glob("*.cu"):
        text = (folder / "cuda" / f"{source.stem}.o.log").read_text()
        assert set(re.findall(r"for 'sm_(\w+)'", text)) == {arch.replace(".", "") for arch in archs}
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        assert spills and not any(spills), f"{source.name}: {text}"
        assert "warning" not in text, f"{source.name}: {text}"


@pytest.mark.skipif(tool("nm") is None, reason="needs nm (binutils)")
def test_extension_links(nvcc_build):
    symbols = run(tool("nm"), "-DC", "--undefined-only", nvcc_build / "_C_cuda.abi3.so")
    from_cuda = {s.split()[-1] for s in symbols.splitlines() if "cuda_" in s and "device_type" not in s}
    stub = (nvcc_build / "generated/torch_cuda.cpp").read_text() if (nvcc_build / "stub").exists() else ""
    assert {"aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_mm_out", "aoti_torch_cuda_addmm_out"} <= from_cuda
    assert not stub or all(f" {symbol}()" in stub for symbol in from_cuda), from_cuda
    # else the products, which are data, would be looked up where `import torch` has not put them
    assert "Shared library: [libtorch_cuda.so]" in run(tool("readelf"), "-d", nvcc_build / "_C_cuda.abi3.so")
    assert "spectral_ops::" not in symbols, "a launch function is declared but not defined"


LOAD = """
import ctypes, importlib.util, sys
import torch
from spectral_ops import _library
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_LOCAL)  # in whose place a torch with CUDA has loaded the real one
spec = importlib.util.spec_from_file_location("spectral_ops._C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
module.register()
assert module.schema_hash == _library.schema_hash()
registered = torch._C._dispatch_has_kernel_for_dispatch_key
print(sum(registered(f"spectral_ops::{name}", "CUDA") for name in module.operators), len(module.operators))
"""


@pytest.mark.parametrize("python", ["this", "SPECTRAL_OPS_CUDA_PYTHON"])
def test_extension_loads(nvcc_build, python):
    """torch loads its libraries with local scope, so what _C_cuda takes from libtorch_cuda is found by its name alone.

    Without CUDA in torch an empty libtorch_cuda stands in; SPECTRAL_OPS_CUDA_PYTHON names a Python whose torch has it.
    """
    stub = nvcc_build / "stub" / "libtorch_cuda.so"
    if python == "this" and torch.version.cuda is None and not stub.exists():
        pytest.skip("the build found a libtorch_cuda, which this torch has not")
    interpreter = sys.executable if python == "this" else os.environ.get(python)
    if not interpreter:
        pytest.skip(f"{python} names no Python whose torch has CUDA")
    registered, operators = run(interpreter, "-c", LOAD, nvcc_build / "_C_cuda.abi3.so", stub).split()
    assert registered == operators and int(operators) >= 37


def test_a_wheel_with_it_passes_its_audit(nvcc_build, tmp_path):
    """The tag manylinux_2_28 although this machine's glibc may be newer, compressed images, nothing of this machine."""
    for module in ("auditwheel", "abi3audit"):
        pytest.importorskip(module, reason="pip install -r requirements/wheel.txt")
    made = wheel.build("none", False, False, tmp_path / "cpu")
    files = archive.unpack(made)
    files["spectral_ops/_C_cuda.abi3.so"] = (nvcc_build / "_C_cuda.abi3.so").read_bytes()
    archive.pack(files, tmp_path / made.name)
    repaired = repair.repair(tmp_path / made.name, tmp_path / "repaired")
    result = audit.audit(repaired)
    assert not result.faults, result.faults
    assert "-manylinux_2_28_" in repaired.name
    stated = "\n".join(archive.metadata(archive.unpack(repaired)).get_all("Supported-Platform"))
    assert re.search(rf"CUDA [\d.]+, driver >= \d+, architectures {' '.join(ARCHS)}$", stated)
    bill = archive.unpack(repaired)[next(n for n in archive.unpack(repaired) if n.endswith(".cdx.json"))].decode()
    assert "cudart_static" in bill and "NVIDIA CUDA Toolkit EULA" in bill


@pytest.mark.skipif(
    not all(map(tool, ("strip", "nvcc", "cmake", "ninja"))), reason="needs nvcc, CMake, Ninja, binutils"
)
def test_the_code_is_the_same_from_another_folder(tmp_path):
    """nvcc would put a hash of the whole path into names. The name of its temporary file is stripped."""
    name, stripped = "cuda/csr_scatter_gather.o", []
    for folder in ("a", "a-folder-of-another-length"):
        root = copy_of_sources(tmp_path / folder)
        settings = ["-DSPECTRAL_OPS_CUDA=ON", "-DSPECTRAL_OPS_CUDA_ARCHS=8.0"]
        settings += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        run(tool("cmake"), "-G", "Ninja", "-S", root, "-B", root / "build", *settings)
        run(tool("ninja"), "-C", root / "build", name)
        stripped.append(root / "stripped.o")
        run(tool("strip"), "--strip-unneeded", root / "build" / name, "-o", stripped[-1])
    assert stripped[0].read_bytes() == stripped[1].read_bytes()


@pytest.fixture(scope="module")
def kernels(nvcc_build):
    """How often each of INSTRUCTIONS occurs in each kernel on sm_90a: {name with template arguments: Counter}."""
    cuobjdump = sass.disassembler()
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither on PATH nor part of an installed Triton")
    found = {}
    for source in SOURCES.glob("*.cu"):
        text = run(cuobjdump, "-sass", "-arch", "sm_90a", nvcc_build / "cuda" / f"{source.stem}.o")
        for part in re.split(r"Function : ", text)[1:]:
            symbol, _, body = part.partition("\n")
            found[source.stem, symbol] = counts = Counter()
            for words, times in Counter(LINE.findall(body)).items():  # of which there are some hundreds
                counts.update({name: times for name, pattern in INSTRUCTIONS.items() if re.search(pattern, words)})
    return found


def of(kernels, stem, name, arguments=""):
    """The kernels ``name`` of an operator's sources, by a pattern on their mangled template arguments."""
    pattern = rf"\d{name}I{arguments}" if arguments else rf"\d{name}[EI]"
    chosen = {
        symbol: counts
        for (source, symbol), counts in kernels.items()
        if source.split("_")[0] == stem and re.search(pattern, symbol)
    }
    assert chosen, f"{stem} has no kernel {name} {arguments}"
    return chosen


HALF = r"(?:6__half|13__nv_bfloat16)"


def test_no_local_memory_and_no_atomics(kernels):
    for name, counts in kernels.items():
        assert counts["local"] == 0, name
        assert counts["atomic"] == 0, name  # reductions take two stages, so that they are reproducible


@pytest.mark.parametrize(
    "stem, kernel, instructions",
    [
        ("lowrank", "update_mma", ("HMMA", "LDG128", "STG128")),
        ("dora", "norm_mma", ("HMMA", "LDG128", "LDGSTS128", "LDS128")),
        ("lowrank", "backward_mma", ("HMMA", "MOVM", "LDSM", "LDS128")),
        ("bat", "weight_mma", ("HMMA", "LDS128")),
        ("bat", "contract_mma", ("HMMA", "MOVM")),
    ],
)
def test_half_precision_uses_matrix_units(kernels, stem, kernel, instructions):
    chosen = of(kernels, stem, kernel, HALF)
    for symbol, counts in chosen.items():
        for instruction in instructions:
            assert counts[instruction] > 0, (symbol, instruction, counts)


def test_bat_loads_ahead_and_converts_in_pairs(kernels):
    """A warp's 16 reads of W and G are there twice: before the loop, and in it for the next step; as are its 8 of W."""
    for symbol, counts in of(kernels, "bat", "contract_mma", f"{HALF}.*Li4E").items():
        assert counts["LDG64"] + counts["LDG128"] >= 2 * 16, (symbol, counts)
    for symbol, counts in of(kernels, "bat", "contract_mma", HALF).items():
        assert counts["F2F"] == 0, (symbol, counts)
    for symbol, counts in of(kernels, "bat", "weight_mma", HALF).items():
        assert counts["LDG64"] >= 2 * 8 + 16, (symbol, counts)  # 16 of a float64 bat


def test_one_place_sets_the_shared_memory_of_kernels():
    text = "".join(path.read_text() for path in SOURCES.iterdir())
    assert text.count("cudaFuncSetAttribute(") == 1 and "MaxDynamicSharedMemorySize, kMost)" in text


def test_hopper_form_keeps_its_products_under_way(kernels, nvcc_build):
    chosen = of(kernels, "lowrank", "backward_wgmma", HALF)
    assert len(chosen) == 2
    for symbol, counts in chosen.items():
        # a step: four to a tile of 64 columns for u, eight to the 128 columns of a warpgroup for dB
        assert counts["HGMMA by rows"] == 4 and counts["HGMMA by columns"] == 8, (symbol, counts)
        assert counts["LDGSTS128"] > 0 and counts["cluster barrier"] > 0, (symbol, counts)
    text = (nvcc_build / "cuda" / "lowrank_backward_wgmma.o.log").read_text()
    assert not re.search(r"\(C75\d\d\)", text), text  # ptxas has serialized them
    used = re.findall(r"entry function '\S*\dbackward_wgmmaI\S*' for 'sm_90a'.*?Used (\d+) registers", text, re.DOTALL)
    assert len(used) == 2, text
    assert all(64 <= int(n) <= 96 for n in used), used  # has_body() wants as many; 640 threads leave no more


def test_hopper_product_is_of_the_widest_instructions(kernels, nvcc_build):
    """TMA in and out, products of 64x256x16 that ptxas has not serialized, registers moved from the copies' warps."""
    chosen = of(kernels, "lowrank", "two_segment", HALF)
    for symbol, counts in chosen.items():
        # of a stage before the loop and of one in it, and a part of the second segment's
        assert counts["HGMMA of 256"] == 4 + 4 + 1 and counts["HGMMA of no descriptor"] == 0, (symbol, counts)
        assert counts["registers moved"] == 2 and counts["STSM"] == 16 and counts["cluster barrier"] == 2, (
            symbol,
            counts,
        )
        assert counts["TMA load"] > 0 and counts["TMA multicast"] > 0 and counts["TMA store"] == 4, (symbol, counts)
    assert Counter(counts["HGMMA of 256, turned"] for counts in chosen.values()) == {0: 2, 1: 2, 8: 2, 9: 2}
    text = (nvcc_build / "cuda" / "lowrank_matmul.o.log").read_text()
    assert not re.search(r"\(C75\d\d\)", text), text  # ptxas has serialized them
    entries = re.findall(
        r"entry function '\S*\d{2}two_segmentI\S*' for '(\w+)'.*?Used (\d+) registers", text, re.DOTALL
    )
    assert len(entries) == len(ARCHS) * len(chosen), text
    for arch, registers in entries:  # 384 threads leave 168; of another architecture the body is empty
        assert int(registers) == 168 if arch == "sm_90a" else int(registers) < 64, (arch, registers)


@pytest.mark.parametrize("label", ["r 16", "r 64", "r 16, dx", "r 16, g and bias", "r 64, D"])
@pytest.mark.parametrize("d, k", cases.SHAPES)
def test_hopper_product_is_expected_near_its_roofline(nvcc_build, d, k, label):
    """Whatever route the operator takes; what is left is L2's and the last turn of the blocks."""
    case = next(case for case in cases.MORE if (case.operator, case.label) == ("lowrank_matmul", label))
    args = case.arguments(cases.Make(8192, d, k, "meta"))
    by_columns = [int(args[i].stride(0) == 1) for i in (1, 3)]
    launch = Launch(f"two_segment<__nv_bfloat16, {by_columns[0]}, {by_columns[1]}>", 132, 384, 230_464)
    code = sass.kernels(nvcc_build / "cuda" / "lowrank_matmul.o")[launch.kernel]
    time = estimate(code, lowrank.work(launch, case, args), launch.blocks, launch.threads, launch.dynamic)
    assert time.resident == 1 and time.bound in ("L2", "wgmma"), time
    assert 0.85 < table.floor(case, args) / time.seconds < 1, time


@pytest.mark.skipif(tool("nvcc") is None, reason="nvcc is not on PATH")
def test_hopper_product_compiles_within_a_minute(tmp_path):
    """By the processor's clock, which other work on the machine does not stop."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", "-cubin", "-o", tmp_path / "matmul.cubin"]
    run(tool("nvcc"), *flags, "-I", ROOT / "csrc", SOURCES / "lowrank_matmul.cu")
    assert spent() - before < 60


@pytest.mark.parametrize(
    "kernel, arguments, loads, shared",
    [
        ("spmm_slab", r"\w+Li6ELb1E", 8 + 6, 6 * 8),  # a slab, and out at six rows; eight entries of six rows
        ("spmm_slab", r"\w+Li2ELb1E", 8 + 2, 2 * 8),
        ("spmm_slab", r"\w+Li2ELb0E", 0, 2 * 8),
        ("sampled_product", r"\w+EndsE1E", 16, 2 * 8),  # slabs of x and dy; eight entries of both
        ("sampled_product", r"\w+EndsE0E", 16, 2 * 8),
    ],
)
def test_slabs_move_16_bytes_at_a_time(kernels, kernel, arguments, loads, shared):
    for symbol, counts in of(kernels, "csr", kernel, arguments).items():
        assert counts["LDG128"] >= loads and counts["LDS128"] >= shared, (symbol, counts)
        assert counts["LDS narrow"] == counts["SHFL apart"] == 0, (symbol, counts)


def test_lowrank_backward_of_aligned_rows_is_lean(nvcc_build, kernels):
    """Its loop copies 16 bytes at a time, asks memory for nothing else, and is as short as the estimates take it."""
    wide = of(kernels, "lowrank", "backward_mma", HALF + r"Li\d+ELi\d+ELb[01]ELb1E")
    for symbol, counts in wide.items():
        assert counts["LDGSTS128"] > 0 and ("Lb0ELb1E" in symbol or counts["STG128"] > 0), symbol
    codes = sass.kernels(nvcc_build / "cuda" / "lowrank_backward.o")
    for arguments, registers, length in (
        ("2, 1, false", 128, 270),
        ("4, 1, false", 192, 310),
        ("4, 2, false", 168, 260),
        ("2, 1, true", 128, 370),
        ("4, 1, true", 160, 390),
        ("4, 2, true", 208, 460),
    ):
        for T in ("__half", "__nv_bfloat16"):
            code = codes[f"backward_mma<{T}, {arguments}, true>"]
            loop = code.loop("HMMA")
            assert code.registers <= registers and len(loop) <= length, (T, arguments, code.registers, len(loop))
            assert not any(op.startswith("LDG.") for op in loop), (T, arguments)


@pytest.mark.parametrize(
    "stem, kernel",
    [
        ("lowrank", "update_fma"),
        ("lowrank", "backward_fma"),
        ("dora", "norm_fma"),
        ("bat", "weight_fma"),
        ("bat", "contract_fma"),
    ],
)
def test_single_and_double_precision_never_round_to_tf32(kernels, stem, kernel):
    for symbol, counts in of(kernels, stem, kernel).items():
        assert counts["HMMA"] == 0, symbol


def test_dora_keeps_loads_under_way(kernels):
    for symbol, counts in of(kernels, "dora", "norm_mma").items():
        assert counts["LDG128"] >= 16, symbol  # two steps of four rows of W before the loop, two in it
    for symbol, counts in of(kernels, "dora", "prepare").items():
        assert counts["LDG128"] >= 12, symbol  # the fingerprint's, of three element sizes
    for symbol, counts in of(kernels, "dora", "norm_finish", rf"(?:{HALF}|f)E").items():
        assert counts["LDG128"] >= 8 + 4 and counts["LDS128"] >= 4, symbol  # four splits of two rows; A Aᵀ
    for symbol, counts in of(kernels, "dora", "magnitude_sums", r"\w+Lb1E").items():
        assert counts["LDG128"] >= 4 + 4 + 8, symbol  # x ahead of the loop and in it, eight rows of W


def test_streams_are_16_bytes_wide(kernels):
    wide = r"(?:6__halfLi8E|13__nv_bfloat16Li8E|fLi4E|dLi2E)"
    for kernel, plain, dropout in (("cyclic_sum", 8, 2), ("run_sum", 4, 2)):
        for symbol, counts in of(kernels, "blocksum", kernel, wide).items():
            assert counts["LDG128"] >= (plain if "Lb0E" in symbol else dropout), symbol  # under way at once
    for symbol, counts in of(kernels, "blocksum", "tile").items():
        if not re.search(r"Li1E", symbol):
            assert counts["LDGSTS128"] >= 5 and counts["STG128"] > 0, symbol  # four under way, and the next


def test_whole_tiles_move_only_16_bytes(kernels):
    for symbol, counts in of(kernels, "blocksum", "tile", r"\S+Li[248]ELb1E").items():
        assert counts["STG"] == counts["STG128"] == 1 and counts["LDG"] - counts["LDG128"] <= 1, symbol  # the seed


def test_whole_updates_move_only_16_bytes(kernels):
    for chunks in (0, 1, 2):
        chosen = of(kernels, "lowrank", "update_mma", rf"{HALF}Li{chunks}ELi8E")
        for symbol, counts in chosen.items():
            assert counts["LDG"] - counts["LDG128"] <= 2, symbol  # g and shift
            assert counts["STG"] == counts["STG128"] == 4, symbol  # no loop was unrolled: 32 rows at a time
            # out of the first rows and of the next, h, and B where it stays in registers
            assert counts["LDG128"] >= 4 + 4 + 4 * max(chunks, 1) + 4 * max(chunks, 1), symbol


# Least shares of the roofline at 8,192 tokens, in either shape of W, that the kernels were written for.
SHARES = {
    ("column_norm", "r 16"): 0.69, ("column_norm", "r 64"): 0.65,
    ("lowrank_backward", "r 16"): 0.84, ("lowrank_backward", "r 16 with y and gdy"): 0.85,
    ("lowrank_backward", "r 64"): 0.75, ("lowrank_backward", "r 64 with y and gdy"): 0.70,
    ("lowrank_update_", "r 16"): 0.90, ("lowrank_update_", "r 64"): 0.80,
    ("block_sum", "r 64"): 0.85, ("block_tile_", "r 64"): 0.85,
    ("bat_weight_", "r 64"): 0.80, ("bat_contract_", "r 64"): 0.80,
    ("magnitude_grad", "a column vanishes"): 0.70,
    ("csr_spmm_", "0.6 %"): 0.25, ("csr_sddmm", "0.6 %"): 0.13,
}  # fmt: skip


@pytest.mark.thorough
def test_kernels_are_expected_near_their_rooflines(nvcc_build, kernels):
    """By the instructions that this build has; h100.json, and so the documentation, says what it gives."""
    rows = {row.key: row for row in table.compiled(nvcc_build / "cuda")}
    for (_, operator, label, tokens, d, _), row in rows.items():
        if tokens == 8192:
            assert row.share >= SHARES.get((operator, label), 0), (operator, label, d, row.share)
    if table.compilers().get("nvcc") != table.written_by()["nvcc"]:
        pytest.skip(f"h100.json is of nvcc {table.written_by()['nvcc']}; `python -m benchmarks.estimates --write`")
    kept = {row.key: row for row in table.read() if row.backend == "cuda"}
    assert rows.keys() == kept.keys()
    for key, row in rows.items():
        assert row.seconds == pytest.approx(kept[key].seconds, rel=0.02), key
