"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and sm_100 as its launcher would compile it.

The launchers run on meta tensors of real sizes and every launch is recorded instead of made, so that what is
compiled is what would run: the table's tiles, the arguments' types and their specialisation. ``python
tests/kernels/test_triton_aot.py`` prints the table of registers, spills, shared memory and instructions.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from triton import knobs  # noqa: E402

if knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from spectral_ops import triton_kernels  # noqa: E402
from spectral_ops._library import OPERATORS  # noqa: E402
from spectral_ops.bench.samples import arguments  # noqa: E402
from spectral_ops.triton_kernels import common, launcher  # noqa: E402
from spectral_ops.triton_kernels.aot import Launch, compiling, recorded  # noqa: E402
from spectral_ops.triton_kernels.aot import compiled as compile_launch  # noqa: E402
from spectral_ops.triton_kernels.aot import key as launch_key  # noqa: E402

ARCHS = (80, 90, 100)
SHARED = {80: 99, 90: 227, 100: 227}  # KiB; sm_80's table also serves 8.6, 8.9 and 12.x, which have 99
REGISTERS = 255
NAMES = [name for name, operator in OPERATORS.items() if triton_kernels.has(operator.stem, name)]
STEMS = sorted({OPERATORS[name].stem for name in NAMES})
MODULES = [importlib.import_module(f"spectral_ops.triton_kernels.{stem}") for stem in STEMS]
MATRIX_INSTRUCTIONS = {"UTCHMMA": "tcgen05.mma", "HGMMA": "wgmma.mma_async", "HMMA": "mma.sync"}  # in SASS and PTX


@functools.cache
def samples(dtype: torch.dtype, T: int = 8192, k: int = 4096, d: int = 4096) -> dict[str, tuple[str, str, tuple]]:
    """case -> (stem, operator, arguments on the meta device): those whose registers and memory were looked into, and
    of an operator without any its own samples."""

    def make(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.float32
    x, dy, y, W, seed = make(T, k), make(T, d), make(T, d), make(d, k), make(1, dtype=torch.int64)
    g, bias = make(d, dtype=wide), make(d)
    stamp, offsets = make(2, dtype=torch.int64), make(65, dtype=torch.int32)
    cases = {}
    for r in (16, 64, 256):
        h, A, B = make(T, r), make(r, k), make(d, r)
        A32, B32 = make(r, k, dtype=wide), make(d, r, dtype=wide)
        lora = (dy, h, B, 0.5, None, None, None, True, True, True, False)
        dora = (dy, h, B, 0.5, g, y, bias, True, True, True, True)
        cases |= {
            f"lowrank_backward r{r}": ("lowrank", "lowrank_backward", lora),
            f"lowrank_backward dora r{r}": ("lowrank", "lowrank_backward", dora),
            f"lowrank_backward dora short r{r}": (
                "lowrank", "lowrank_backward", (dy[:2048], h[:2048], B, 0.5, g, y[:2048], *dora[6:])),
        }  # fmt: skip
        if r == 256 or (r == 64 and dtype == torch.float32):
            continue  # the other kernels walk large ranks in steps of the sizes already seen
        cases |= {
            f"lowrank_matmul r{r}": ("lowrank", "lowrank_matmul", (x, W, h, B, 0.5, None, None)),
            f"lowrank_update_ r{r}": ("lowrank", "lowrank_update_", (y, h, B, 0.5, g, g)),
            f"column_norm r{r}": ("dora", "column_norm", (W, A, B, 0.5)),
            f"column_norm float32 A r{r}": ("dora", "column_norm_cached_", (g, stamp, W, A32, B32, 0.5, False)),
            f"dropout_project r{r}": ("dropout", "dropout_project", (x, A, seed, 0.1)),
            f"dropout_outer r{r}": ("dropout", "dropout_outer", (h, x, seed, 0.1)),
            f"dropout_lift_ r{r}": ("dropout", "dropout_lift_", (x, h, A, seed, 0.1)),
        }
    for r in (16, 64, 256):
        col, row, col32 = make(d // r, r, r), make(k // r, r, r), make(d // r, r, r, dtype=wide)
        G, few, dC = make(d, k, dtype=wide), make(min(r - 1, 64), k), make(d // r, r, r, dtype=wide)
        cases |= {
            f"bat_weight_ r{r}": ("bat", "bat_weight_", (W, W, col, False, False)),
            f"bat_weight_ row float32 C r{r}": ("bat", "bat_weight_", (W, W, row.to(wide), True, False)),
            f"bat_weight_ delta r{r}": ("bat", "bat_weight_", (G, W, col32, False, True)),
            f"bat_matmul r{r}": ("bat", "bat_matmul", (few, W, col32, False)),
            f"bat_matmul transpose r{r}": ("bat", "bat_matmul", (few, W, col, True)),
            f"bat_contract_ r{r}": ("bat", "bat_contract_", (dC[: 2048 // r], W[:2048], G[:2048])),
            f"bat_contract_ half G r{r}": ("bat", "bat_contract_", (dC, W, W)),
            f"bat_mix r{r}": ("bat", "bat_mix", (x, row)),
            f"bat_mix_backward_ r{r}": ("bat", "bat_mix_backward_", (x, make(T, r), x, row.to(wide), True, True)),
            f"bat_mix_backward_ dC r{r}": ("bat", "bat_mix_backward_", (x, make(T, r), x, row, False, True)),
        }
    col63, odd_W = make(65, 63, 63, dtype=wide), make(4095, 4095).t()
    cases |= {
        "bat_weight_ r63 odd": ("bat", "bat_weight_", (odd_W, odd_W, col63, False, False)),
        "bat_matmul r63 odd": ("bat", "bat_matmul", (make(33, 4095), odd_W, col63, False)),
        "bat_contract_ r63 odd": ("bat", "bat_contract_", (col63, odd_W, make(4095, 4095))),
        "bat_mix r63 odd": ("bat", "bat_mix", (make(T, 4095), col63)),
        "bat_mix_backward_ r63 odd": (
            "bat", "bat_mix_backward_", (make(T, 4095), make(T, 63), make(T, 4095), col63, True, True)),
    }  # fmt: skip
    h, B = make(T, 64), make(d, 64)
    odd = make(T, k - 1)
    cases |= {
        "lowrank_matmul g b odd": (
            "lowrank", "lowrank_matmul", (odd, make(k - 1, d).t(), make(T, 63), make(d, 63), 0.5, g, bias)),
        "lowrank_matmul g b": ("lowrank", "lowrank_matmul", (x, W, h, B, 0.5, g, bias)),
        "lowrank_matmul odd r": ("lowrank", "lowrank_matmul", (x, W, make(T, 3), make(d, 3), 0.5, g, bias)),
        "lowrank_update_ odd": ("lowrank", "lowrank_update_", (odd, make(T, 63), make(k - 1, 63), 0.5, g, g)),
        "lowrank_backward odd": (
            "lowrank", "lowrank_backward",
            (odd, make(T, 63), make(k - 1, 63), 0.5, g, odd, bias, True, True, True, True)),
        "column_norm odd": ("dora", "column_norm", (make(k - 1, d).t(), make(63, k - 1), make(d, 63), 0.5)),
        "dropout_outer odd": ("dropout", "dropout_outer", (make(T, 63), odd, seed, 0.1)),
        "dropout_lift_ odd": ("dropout", "dropout_lift_", (odd, make(T, 63), make(63, k - 1), seed, 0.1)),
        "seeded_dropout odd": ("dropout", "seeded_dropout", (odd, seed, 0.1)),
        "magnitude_grad": ("dora", "magnitude_grad", (g, dy, x, h, W, B, 0.5, g, g, bias)),
        "dropout_project odd": ("dropout", "dropout_project", (odd, make(64, k - 1), seed, 0.1)),
        "seeded_dropout": ("dropout", "seeded_dropout", (x, seed, 0.1)),
        "block_sum r64": ("blocksum", "block_sum", (x, 64, None, None, 0.0)),
        "block_sum r64 dropout": ("blocksum", "block_sum", (x, 64, None, seed, 0.1)),
        "block_sum r63 odd dropout": ("blocksum", "block_sum", (odd, 63, None, seed, 0.1)),
        "block_sum r1": ("blocksum", "block_sum", (x, 1, None, None, 0.0)),
        "block_sum runs": ("blocksum", "block_sum", (x, 64, offsets, None, 0.0)),
        "block_tile_ r64": ("blocksum", "block_tile_", (x, h, None, None, 0.0, False)),
        "block_tile_ r64 add": ("blocksum", "block_tile_", (x, h, None, None, 0.0, True)),
        "block_tile_ r64 add dropout": ("blocksum", "block_tile_", (x, h, None, seed, 0.1, True)),
        "block_tile_ runs": ("blocksum", "block_tile_", (x, h, offsets, None, 0.0, True)),
    }  # fmt: skip
    layers = [make(16, k), make(d, 16), make(16, 1)] * 2
    cases |= {
        "importance_update_": (
            "importance", "importance_update_", (g, g, layers, layers, [], 0.85, 0.85, True)),
        "importance_prune_": ("importance", "importance_prune_", (make(32, dtype=wide), layers[2::3], [0, 16], 9)),
    }  # fmt: skip
    for r in (16, 64):
        G = make(210, r, r, dtype=wide)
        cases[f"cayley_forward r{r}"] = ("cayley", "cayley_forward", (make(210, r, r),))
        cases[f"cayley_backward r{r}"] = ("cayley", "cayley_backward", (G, G))
    nnz = 100_663  # 0.6 %
    indices = make(d + 1, dtype=torch.int32), make(nnz, dtype=torch.int32)
    values, few = make(nnz, dtype=wide), slice(0, 16)
    cases |= {
        "csr_scatter_ add": ("csr", "csr_scatter_", (W, values, *indices, True)),
        "csr_scatter_ transposed": ("csr", "csr_scatter_", (make(k, d).t(), values, *indices, False)),
        "csr_gather_": ("csr", "csr_gather_", (values, W, *indices)),
        "csr_spmm_ few": ("csr", "csr_spmm_", (y[few], x[few], values, *indices, None)),
        "csr_spmm_ permuted": ("csr", "csr_spmm_", (y, x, values, *indices, indices[1])),
        "csr_sddmm": ("csr", "csr_sddmm", (dy, x, *indices)),
        "csr_sddmm few": ("csr", "csr_sddmm", (dy[few], x[few], *indices)),
        "csr_sddmm odd": ("csr", "csr_sddmm", (dy, odd, *indices)),
    }
    token, row = make(512, dtype=torch.int64), make(512, dtype=wide)
    for label, V in (("", 128_256), (" odd", 50_257)):
        cases[f"target_logprob{label}"] = ("policy", "target_logprob", (make(512, V), token, 1.0, -100))
        cases[f"softmax_gradient_{label}"] = ("policy", "softmax_gradient_", (make(512, V), token, row, row, 1.0, -100))
    places, As, Bs = (make(T, dtype=torch.int64), make(33, dtype=torch.int64)), make(32, 128, k), make(32, d, 128)
    h, turned, few = make(T, 128), make(d, 32, 16).transpose(0, 1), (make(4, dtype=torch.int64),)
    cases |= {
        "segment_project r128": ("segments", "segment_project", (x, As, *places)),
        "segment_project back r16": ("segments", "segment_project", (dy, turned.transpose(1, 2), *places)),
        "segment_project odd": ("segments", "segment_project", (odd, make(3, 128, k - 1), places[0], *few)),
        "segment_lift_ r128": ("segments", "segment_lift_", (y, h, Bs, *places)),
        "segment_lift_ odd": ("segments", "segment_lift_", (odd, h, make(3, k - 1, 128), places[0], *few)),
        "segment_outer r128": ("segments", "segment_outer", (h, x, *places)),
        "segment_outer odd": ("segments", "segment_outer", (h, odd, places[0], *few)),
    }
    ends, packed = make(129, dtype=torch.int32), make(2048, 16, 128).permute(2, 0, 1)  # PEFT's lora_B of 128 experts
    for label, order in (("", None), (" gathered", make(32768, dtype=torch.int64))):
        rows, u, A = make(4096 if label else 32768, 2048), make(32768, 16), make(128, 16, 2048)
        cases |= {
            f"segment_project experts{label}": (
                "segments",
                "segment_project",
                (rows, make(128, 16, 2048), order, ends),
            ),
            f"segment_outer experts{label}": ("segments", "segment_outer", (u, rows, order, ends)),
        }
    rows = make(32768, 2048)
    cases |= {
        "segment_project experts back": ("segments", "segment_project", (rows, packed.mT, None, ends)),
        "segment_lift_ experts": ("segments", "segment_lift_", (rows, u, packed, None, ends)),
    }
    for label, K, d in (("", 8, 2048), (" odd", 3, 2047)):
        y, g = make(4096 * K, d), make(4096, d)
        routed = make(4096, K, dtype=wide), make(4096, K, dtype=torch.int64), ends
        cases[f"routing_combine{label}"] = ("routing", "routing_combine", (y, *routed))
        cases[f"routing_combine_backward{label}"] = ("routing", "routing_combine_backward", (g, y, *routed, True))
    for name in sorted(set(NAMES) - {operator for _, operator, _ in cases.values()}):
        for i, args in enumerate(arguments(name, 512, 1024, 1024, 64, dtype, "cpu")):
            args = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
            cases[f"{name} r64 {i}"] = OPERATORS[name].stem, name, args
    return cases


@dataclass
class Build:
    """What one compiled kernel needs."""

    name: str
    arch: int
    grid: tuple
    registers: int
    spills: int  # bytes of a thread's stack frame, which is where registers spill to
    shared: int
    threads: int
    ptx: str
    cubin: bytes

    @functools.cached_property
    def sass(self) -> str:
        return cuobjdump(self.cubin, "-sass")

    def count(self, instruction: str) -> int:
        """How often an instruction occurs in the machine code."""
        return len(re.findall(rf"\b{instruction}", self.sass))

    @property
    def product(self) -> str:
        """The matrix instruction it uses, as PTX asks for it: disassembling takes longer than compiling."""
        for name, instruction in MATRIX_INSTRUCTIONS.items():
            if instruction in self.ptx:
                return name
        return "FFMA" if "fma.rn.f32" in self.ptx else "-"


_builds: dict[tuple, Build] = {}


TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
if not TOOL.exists():
    pytest.skip(f"this triton brings no {TOOL.name} to read machine code with", allow_module_level=True)


def cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def build(arch: int, kernel: object, grid: tuple, args: tuple, kwargs: dict) -> Build:
    launch = Launch(kernel, grid, args, kwargs)
    with compiling(arch):
        key = arch, *launch_key(launch)
        compiled = None if key in _builds else compile_launch(launch)
    if compiled:
        ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
        report = cuobjdump(cubin, "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
        assert found, report
        registers, stack, local = map(int, found.groups())
        _builds[key] = Build(
            kernel.__name__, arch, grid, registers, stack + local, compiled.metadata.shared,
            32 * compiled.metadata.num_warps, ptx, cubin,
        )  # fmt: skip
    return _builds[key]


def builds(arch: int, stem: str, operator: str, args: tuple, **options: str) -> list[Build]:
    with recorded(arch) as launches:
        launcher(stem, operator)(*args, **options)
    assert launches
    return [build(arch, *launch) for launch in launches]


# every module's tables of tiles, by element size or architecture and element size
TABLES = [
    table
    for module in MODULES
    for table in vars(module).values()
    if isinstance(table, dict) and any(key in (2, 4) or isinstance(key, tuple) and key[0] in ARCHS for key in table)
]
PRODUCTS = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}
WITH_PRODUCTS = ("matmul_kernel", "described_matmul_kernel", "update_kernel", "backward_kernel", "project_kernel",
                 "outer_kernel", "lift_kernel", "weight_kernel", "contract_kernel", "mix_kernel",
                 "mix_backward_kernel")  # fmt: skip


def matrix() -> Iterator[tuple[torch.dtype, str, int]]:
    """Every case on sm_100; on sm_80 and sm_90 every operator at rank 64, and in bfloat16 every case but rank 16. Of
    float16, whose products with float32 take more registers, the case that takes most of them."""
    yield torch.float16, "bat_mix r63 odd", 80
    for dtype in (torch.bfloat16, torch.float32):
        cases, first = samples(dtype), {}
        for case, (_, operator, _) in sorted(cases.items(), key=lambda item: "r64" not in item[0]):
            first.setdefault(operator, case)
        for case, (_, operator, _) in cases.items():
            everywhere = case == first[operator] or (dtype == torch.bfloat16 and "r16" not in case)
            for arch in ARCHS if everywhere else (100,):
                yield dtype, case, arch


def test_float32_tiles_are_those_of_sm_80_on_sm_90():
    """Why float32 at further ranks is compiled for sm_100 alone: only there may its tiles differ."""
    for table in TABLES:
        assert common.entry(table, 80, 4) == common.entry(table, 90, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, case, arch", list(matrix()), ids=lambda v: str(v).removeprefix("torch."))
def test_fits_the_processor(dtype, case, arch):
    """No spills; registers and shared memory within limits; tensor cores wherever half precision is multiplied."""
    for b in builds(arch, *samples(dtype)[case]):
        assert b.spills == 0, (b.name, b.spills)
        assert b.registers <= REGISTERS, (b.name, b.registers)
        assert b.shared <= SHARED[arch] * 1024, (b.name, b.shared)
        half_product = b.name in WITH_PRODUCTS or (b.name == "norm_kernel" and case.startswith("column_norm"))
        if dtype == torch.bfloat16 and half_product:
            assert b.product in PRODUCTS[arch], (b.name, b.product)
        if arch == 90 and dtype == torch.bfloat16 and case.startswith("lowrank_matmul"):
            assert b.product == "HGMMA" and "mma.sync" not in b.ptx
        if arch == 90 and dtype == torch.bfloat16 and half_product and "experts" in case:
            assert b.product == "HGMMA", b.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, tiles, arch", [("lowrank_update_ r64", "wide", 100), ("lowrank_matmul r64", "deep", 90)]
)
def test_other_tiles_fit_too(case, tiles, arch):
    """The largest of those that the tuner may choose; the rest were compiled once when they were listed."""
    stem, operator, args = samples(torch.bfloat16)[case]
    assert tiles in triton_kernels.tiles(stem, operator)
    for b in builds(arch, stem, operator, args, tiles=tiles):
        assert b.spills == 0 and b.registers <= REGISTERS and b.shared <= SHARED[arch] * 1024, b.name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_spills_and_matrix_instructions_are_seen(arch):
    """A kernel held to three quarters of its registers spills; its machine code has what PTX asked for."""
    with recorded(arch) as launches:
        _, operator, args = samples(torch.bfloat16)["lowrank_backward dora r64"]
        launcher("lowrank", operator)(*args)
    kernel, grid, args, kwargs = launches[0]
    free = build(arch, kernel, grid, args, kwargs)
    held = build(arch, kernel, grid, args, kwargs | {"maxnreg": free.registers * 3 // 4})
    assert free.spills == 0 and not free.count(r"(?:LDL|STL)\b")
    assert held.spills > 0 and held.count(r"(?:LDL|STL)\b")
    for name, instruction in MATRIX_INSTRUCTIONS.items():
        assert (instruction in free.ptx) == (free.count(name) > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["bat_weight_ r64", "bat_weight_ row float32 C r64", "bat_weight_ delta r64", "bat_contract_ r64",
     "bat_contract_ half G r64", "bat_mix r64", "bat_mix_backward_ r64"],
)  # fmt: skip
def test_blocks_of_64_use_warpgroups(case):
    """On sm_90 every product of Bat's blocks, their float32 factors included, is a warpgroup's."""
    kernel = builds(90, *samples(torch.bfloat16)[case])[0]
    assert kernel.count("HGMMA") and not kernel.count("HMMA")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_long_passes_are_pipelined(arch):
    """Where rows are aligned, the loops over x, W and dy copy ahead into shared memory, 16 bytes at a time."""
    for case in ("lowrank_matmul r16", "lowrank_backward r16", "lowrank_backward dora r16"):
        tiles = {"tiles": "shallow"} if "matmul" in case else {}  # of the matmul without descriptors
        kernel = builds(arch, *samples(torch.bfloat16)[case], **tiles)[0]
        assert kernel.count(r"LDGSTS\.E\.(?:\w+\.)*128") >= 6, case


@pytest.mark.slow
@pytest.mark.parametrize("arch", (90, 100))
def test_products_have_warps_of_their_own_for_copies(arch):
    """lowrank_matmul copies tiles through descriptors, in warps that hold few registers; the whole tile is stored."""
    kernel = builds(arch, *samples(torch.bfloat16)["lowrank_matmul g b"])[0]
    assert kernel.name == "described_matmul_kernel"
    assert kernel.count("UTMALDG") >= 6 and not kernel.count(r"LDGSTS\b") and kernel.count("USETMAXREG") >= 4
    warps, outputs = {90: (4, 256 * 128), 100: (8, 128 * 128)}[arch]  # of a consumer, each with code of its own
    assert 16 * 32 * warps * kernel.count(r"STG\.E\.128") == 2 * outputs


@pytest.mark.slow
def test_sparse_products_read_turned_rows_16_bytes_at_a_time():
    for case in ("csr_spmm_ permuted", "csr_sddmm odd"):
        kernel = builds(90, *samples(torch.bfloat16)[case])[-1]
        assert kernel.name.startswith("turned") and kernel.count(r"LDG\.E\.128") >= 2, case
        assert not kernel.count(r"LDG\.E\.U16") or case.startswith("csr_spmm_")  # out, whose strides are anyone's


@pytest.mark.thorough
def test_estimates_stay_below_the_roofline():
    """A share above one says that the model was handed the wrong numbers; the rows hold every kind of kernel."""
    from benchmarks.estimates import table
    from benchmarks.estimates import triton as estimates

    shares, kept = {}, {row.key: row for row in table.read()}
    for case in estimates.ALL:
        row, found = estimates.row(case, 8192, 4096, 4096)
        shares[case.name] = row.share
        assert found[0].time.seconds > 0, case.name
        if table.written_by().get("triton") == triton.__version__:
            assert row.seconds == pytest.approx(kept[row.key].seconds, rel=0.02), case.name
    assert {name: share for name, share in shares.items() if not 0 < share <= 1} == {}
    assert shares["lowrank_matmul, r 16"] > 0.5 and shares["column_norm, r 64"] > 0.6


@pytest.mark.slow
def test_masks_multiply_once():
    """A round of Philox is two wide products, not four halves: eight counters of ten rounds."""
    kernel = builds(90, *samples(torch.bfloat16)["block_sum r64 dropout"])[0]
    assert kernel.count(r"IMAD\.HI") == 0 and 140 <= kernel.count(r"IMAD\.WIDE") <= 180


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "block_sum r64",
        "block_tile_ r64",
        "column_norm r16",
        "seeded_dropout",
        "target_logprob",
        "softmax_gradient_",
    ],
)
def test_streams_move_16_bytes_per_access(case):
    kernel = builds(90, *samples(torch.bfloat16)[case])[0]
    assert kernel.count(r"LDG\.E\.(?:\w+\.)*128") or kernel.count(r"STG\.E\.(?:\w+\.)*128"), case


@pytest.mark.parametrize("arch", ARCHS)
def test_tables_are_complete(arch):
    for table in TABLES:
        assert all((arch, size) in table or size in table for size in (2, 4))


def main() -> None:
    """Print the table; arguments filter the cases."""
    wanted = sys.argv[1:]
    head = ("case", "kernel", "sm", "grid", "regs", "spills", "smem KiB", "instruction", "LDGSTS")
    print("{:34} {:22} {:>4} {:>14} {:>5} {:>6} {:>8}  {:11} {:>6}".format(*head))
    for dtype in (torch.bfloat16, torch.float32):
        for case, sample in samples(dtype).items():
            label = f"{case} {str(dtype)[6:]}"
            if wanted and not all(w in label for w in wanted):
                continue
            for arch in ARCHS:
                for b in builds(arch, *sample):
                    grid = "x".join(map(str, b.grid))
                    print(f"{label:34} {b.name:22} {arch:4} {grid:>14} {b.registers:5} {b.spills:6}"
                          f" {b.shared / 1024:8.1f}  {b.product:11} {b.count('LDGSTS'):6}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
