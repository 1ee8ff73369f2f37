"""The Triton kernels' rows: compiled ahead of time for sm_90, as their launchers ask for them.

A row per case of :mod:`.cases`. A kernel's hot loop is the innermost one with its products, or its
loads; ``WORKS`` says for each kernel how often that runs and what it moves. Instructions outside every loop run once
for each warp. What lies in an outer loop alone is left out, and so is the time between a loop's end and the next one's
first loads, which a kernel without warps for its copies spends once a tile. Every byte of memory counts as a load.

    python -m benchmarks.estimates.triton [WORD...]    registers, shared memory, loads in flight, shares of the roofline
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.estimates import table
from benchmarks.estimates.cases import CASES, MORE, Case, Make
from benchmarks.estimates.model import NEXT, RAMP, Code, Time, Work, estimate
from spectral_ops._library import OPERATORS
from spectral_ops._table import table as text
from tests.kernels import test_triton_aot as aot

ARCH = 90
L2_HOLDS = 50e6  # bytes of partial sums, at most, that stay in L2 until the next launch reads them

BEFORE = {  # shares over both layers, and the 4096x4096 one's time: this estimate of the kernels at ddce979
    ("column_norm", "r 16"): "54–55 %, 21 µs",
    ("column_norm", "r 64"): "37–40 %, 30 µs",
    ("lowrank_backward", "r 64"): "32 %, 74 µs",
    ("csr_spmm_", "0.6 %"): "1 %, 4919 µs",
    ("csr_sddmm", "0.6 %"): "1 %, 6476 µs",
    ("dropout_project", "r 16"): "68–70 %, 33 µs",
    ("dropout_project", "r 64"): "56–57 %, 41 µs",
    ("dropout_outer", "r 16"): "59–62 %, 36 µs",
    ("dropout_outer", "r 64"): "58–60 %, 38 µs",
    ("dropout_lift_", "r 64"): "91–94 %, 50 µs",
    ("block_sum", "r 64, dropout"): "45–47 %, 51 µs",
    ("block_tile_", "r 64, dropout"): "54–55 %, 83 µs",
    ("bat_matmul", "r 64"): "44 %, 27 µs",
}

ALL = tuple(case for case in (*CASES, *MORE) if case.name != "magnitude_grad, a column vanishes")

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?PT?\w*\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass
class Loop:
    blocks: frozenset[int]
    opcodes: list[str]

    def count(self, prefix: str) -> int:
        return sum(op.startswith(prefix) for op in self.opcodes)


def natural_loops(sass: str) -> tuple[list[Loop], list[str]]:
    """Every loop, and the opcodes outside all loops. A loop is what can reach a jump back to a place that dominates the
    jump: waits whose spinning was moved to the end of the kernel stay inside."""
    listing = [(int(at, 16), bool(when), opcode, rest) for at, when, opcode, rest in _LINE.findall(sass)]
    index = {at: i for i, (at, *_) in enumerate(listing)}
    jumps: dict[int, list[int]] = {}
    for i, (_, predicated, opcode, rest) in enumerate(listing):
        name, target = opcode.split(".")[0], _TARGET.search(rest)
        if name == "BRA" and target and int(target[1], 16) in index:
            always = not predicated and not re.match(r"\s*!?U?P\d", rest)
            jumps[i] = [index[int(target[1], 16)], *([] if always else [i + 1])]
        elif name in ("EXIT", "RET") and not predicated:
            jumps[i] = []
        elif name == "BRX":  # a warp's role is looked up in a table: every place after it may come next
            jumps[i] = list(range(i + 1, len(listing)))
    starts = sorted({0} | {t for i, to in jumps.items() if listing[i][2] != "BRX" for t in (*to, i + 1)})
    starts = [i for i in starts if i < len(listing)]
    block_of, blocks = {}, []
    for n, (first, end) in enumerate(zip(starts, [*starts[1:], len(listing)], strict=True)):
        blocks.append((first, end))
        block_of |= dict.fromkeys(range(first, end), n)
    after: list[list[int]] = []
    for _, end in blocks:
        to = jumps.get(end - 1, [end])
        after.append(sorted({block_of[t] for t in to if t < len(listing)}))
    before: list[list[int]] = [[] for _ in blocks]
    for n, to in enumerate(after):
        for t in to:
            before[t].append(n)
    roots = {0} | {n for n, come in enumerate(before) if not come}
    everything = (1 << len(blocks)) - 1
    dominators = [1 << n if n in roots else everything for n in range(len(blocks))]
    changed = True
    while changed:
        changed = False
        for n, come in enumerate(before):
            if n in roots:
                continue
            mine = everything
            for c in come:
                mine &= dominators[c]
            mine |= 1 << n
            changed, dominators[n] = changed or mine != dominators[n], mine
    members: dict[int, set[int]] = {}
    for n, to in enumerate(after):
        for header in to:
            if dominators[n] >> header & 1:
                inside, waiting = members.setdefault(header, {header}), [n]
                while waiting:
                    block = waiting.pop()
                    if block not in inside:
                        inside.add(block)
                        waiting += before[block]

    def opcodes(chosen) -> list[str]:
        return [listing[i][2] for n in sorted(chosen) for i in range(*blocks[n])]

    looped = set().union(*members.values()) if members else set()
    return [Loop(frozenset(each), opcodes(each)) for each in members.values()], opcodes(
        set(range(len(blocks))) - looped
    )


def width(opcode: str) -> int:
    """Bytes of each thread that a load or store moves."""
    found = re.search(r"\.U?(128|64|16|8)\b", opcode)
    return int(found[1]) // 8 if found else 4


def wgmma_flops(opcodes: list[str]) -> float:
    """Floating-point operations of a warp's share in the wgmma instructions."""
    shapes = [re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode) for opcode in opcodes]
    return sum(2.0 * math.prod(map(int, shape.groups())) / 4 for shape in shapes if shape)


PRODUCTS = ("HGMMA", "HMMA", "FFMA")


class Launch:
    """A recorded launch with what it compiles to; ``launch.BT`` is an argument."""

    summed = False  # whether the operator adds up partial sums at its end

    def __init__(self, kernel, grid: tuple, args: tuple, kwargs: dict) -> None:
        self.build = aot.build(ARCH, kernel, grid, args, kwargs)
        self.values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.kernel, self.stem = kernel.__name__, kernel.fn.__module__.rsplit(".", 1)[1]
        self.programs, self.threads = math.prod(grid), self.build.threads
        self.warps = self.threads // 32
        self.loops, self.outside = natural_loops(self.build.sass)

    def __getattr__(self, name: str):
        return self.values[name]

    def hot(self, prefix: str) -> list[str]:
        """The innermost loop with most instructions that start with ``prefix``."""
        found = [loop for loop in self.loops if loop.count(prefix)]
        inner = [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]
        return max(inner, key=lambda loop: loop.count(prefix)).opcodes if inner else []

    def work(self, dram: float, in_flight: float, l2: float = 0.0, *, trips: float = 0.0, moved: float = 0.0,
             prefix: str = "", warps: int = 0, uneven: float = 1.0) -> tuple[Code, Work]:  # fmt: skip
        """trips: of all programs' loops; or moved: bytes by the widest instructions with ``prefix`` in the hot loop.
        warps: of a program in it, if not all. uneven: the busiest processor's share of tiles over the mean."""
        prefix = prefix or next((p for p in PRODUCTS if any(loop.count(p) for loop in self.loops)), "")
        loop = self.hot(prefix) if trips or moved else []
        passes = trips * (warps or self.warps)
        if moved and loop:
            widths = [width(op) for op in loop if op.startswith(prefix)]
            passes = moved / (32 * max(widths) * widths.count(max(widths)))
        each = self.programs * self.warps
        flops = uneven * (passes * wgmma_flops(loop) + each * wgmma_flops(self.outside))
        self.mix = loop
        code = Code(self.build.registers, self.build.shared, [["HOT", *loop], ["BODY", *self.outside]])
        return code, Work(
            loops={"HOT": uneven * passes, "BODY": each}, dram=uneven * dram, in_flight=in_flight, l2=uneven * l2,
            flops=flops,
        )  # fmt: skip


def nbytes(*tensors: torch.Tensor | None) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _matmul_work(p: Launch):
    tiles = cdiv(p.T, p.BT) * cdiv(p.d, p.BD)
    l2 = tiles * (p.BT + p.BD) * (p.k + p.r) * 2 - nbytes(p.x, p.w)
    busiest = cdiv(tiles, p.programs) * p.programs / tiles
    ahead = (p.num_stages if p.kernel == "described_matmul_kernel" else p.num_stages - 1) * (p.BT + p.BD) * p.BK * 2
    return p.work(nbytes(p.x, p.w, p.h, p.B, p.out), ahead, l2, trips=tiles * cdiv(p.k, p.BK), warps=8, uneven=busiest)


def _update(p: Launch):
    l2 = p.programs * (p.BT + p.BD) * p.r * 2
    return p.work(2 * nbytes(p.out) + nbytes(p.h, p.B), p.BT * p.BD * 2, l2, trips=p.programs * cdiv(p.r, p.R))


def _partials(*outs: torch.Tensor | None) -> tuple[float, float]:
    """(dram, l2) bytes that writing results takes: partial sums stay in L2 where they fit."""
    if not Launch.summed:
        return nbytes(*outs), 0.0
    parts = nbytes(*(t for t in outs if t is not None and t.dtype == torch.float32))
    wholes = nbytes(*outs) - parts
    return (wholes, parts) if parts <= L2_HOLDS else (wholes + parts, 0.0)


def _lowrank_outer(p: Launch):
    blocks, chunks = cdiv(p.d, p.BD), cdiv(p.r, p.R)
    dram, l2 = _partials(p.dB)
    ahead = (p.num_stages - 1) * p.BT * p.BD * 2
    return p.work(
        dram + nbytes(p.dy) * chunks, ahead, l2 + blocks * nbytes(p.h), trips=blocks * chunks * cdiv(p.T, p.BT)
    )


def _backward(p: Launch):
    blocks, chunks = cdiv(p.T, p.BT), cdiv(p.r, p.R)
    dram, l2 = _partials(p.u, p.dB, p.db, p.dyz)
    dram += nbytes(p.dy) * chunks + nbytes(p.y if p.dyz is not None else None, p.gdy, p.h, p.B)
    ahead = (p.num_stages - 1) * p.BT * p.BD * 2
    return p.work(dram, ahead, l2 + blocks * nbytes(p.B), trips=blocks * chunks * cdiv(p.d, p.BD))


def _sums(p: Launch):
    partials = [p.values[f"p{i}"] for i in range(4)]
    outs = [p.values[f"o{i}"] for i in range(4)]
    parts = nbytes(*partials)
    dram, l2 = (nbytes(*outs), parts) if parts <= L2_HOLDS else (nbytes(*outs) + parts, 0.0)
    return p.work(dram, p.SPLITS * p.BLOCK * 4, l2, moved=parts, prefix="LDG")


def _norm(p: Launch):
    A = p.A.element_size()
    return p.work(nbytes(p.w, p.A, p.B), p.BM * p.BK * 2, cdiv(p.d, p.BM) * p.k * p.r * A,
                  trips=cdiv(p.d, p.BM) * cdiv(p.k, p.BK))  # fmt: skip


def _project(p: Launch):
    blocks, chunks = cdiv(p.T, p.BT), cdiv(p.r, p.R)
    dram, l2 = _partials(p.h)
    return p.work(dram + nbytes(p.x) * chunks, 2 * p.BT * p.BK * 2, l2 + blocks * nbytes(p.A),
                  trips=blocks * chunks * cdiv(p.k, p.BK))  # fmt: skip


def _outer(p: Launch):
    blocks, chunks = cdiv(p.k, p.BK), cdiv(p.r, p.R)
    dram, l2 = _partials(p.dA)
    return p.work(dram + nbytes(p.x) * chunks, 2 * p.BT * p.BK * 2, l2 + blocks * nbytes(p.u),
                  trips=blocks * chunks * cdiv(p.T, p.BT))  # fmt: skip


def _lift(p: Launch):
    return p.work(2 * nbytes(p.out) + nbytes(p.u, p.A), p.BT * p.BK * 2, p.programs * (p.BT + p.BK) * p.r * 2,
                  trips=p.programs * cdiv(p.r, p.R))  # fmt: skip


def _segment_project(p: Launch):
    blocks = p.n * cdiv(p.P // p.n, p.BT)
    return p.work(nbytes(p.x, p.A, p.out), (p.num_stages - 1) * p.BT * p.BK * 2, blocks * p.k * p.r * 2,
                  trips=blocks * cdiv(p.k, p.BK) * cdiv(p.r, p.R))  # fmt: skip


def _segment_lift(p: Launch):
    blocks = p.n * cdiv(p.P // p.n, p.BT)
    ahead = max(p.num_stages - 1, 1) * p.BT * p.BD * 2
    return p.work(2 * nbytes(p.out) + nbytes(p.h, p.B), ahead, blocks * p.d * p.r * 2, trips=blocks * cdiv(p.d, p.BD))


def _segment_outer(p: Launch):
    steps = p.n * cdiv(p.P // p.n, p.BT) * cdiv(p.k, p.BK) * cdiv(p.r, p.R)
    parts = 4.0 * p.r * p.k * p.n * cdiv(p.P // p.n, p.span) if p.P // p.n > p.span else 0.0
    return p.work(nbytes(p.u, p.x, p.out), (p.num_stages - 1) * p.BT * p.BK * 2, parts, trips=steps)


def _combine_backward(p: Launch):
    dram = nbytes(p.dout, p.y, p.weights, p.places, p.dy, p.dweights)
    return p.work(dram, (p.KS + 1) * p.BD * 2, moved=nbytes(p.y), prefix="LDG")


def _block_sum(p: Launch):
    return p.work(nbytes(p.x, p.h), p.BT * p.TURNS * p.R * 2, moved=nbytes(p.x), prefix="LDG")


def _block_tile(p: Launch):
    reads = 1 + bool(p.ACCUMULATE)
    return p.work(reads * nbytes(p.out) + nbytes(p.s), p.BT * p.TURNS * p.R * 2, moved=nbytes(p.out), prefix="STG")


def _weight(p: Launch):
    return p.work(nbytes(p.w, p.out, p.B), (p.num_stages - 1) * p.BM * p.BC * 2, trips=p.n * p.tiles)


def _contract(p: Launch):
    steps = p.n * cdiv(p.turns, p.BM // p.BC) * p.CHUNKS * cdiv(p.r, p.BC) * cdiv(p.r, p.BE)
    ahead = (p.num_stages - 1) * p.BM * (p.BC * 2 + p.BE * p.G.element_size())
    dram, l2 = _partials(p.dB)
    return p.work(nbytes(p.w, p.G) + dram, ahead, l2, trips=steps)


def _few(p: Launch):
    owners = p.width // p.r
    steps = owners * p.CHUNKS**3 * cdiv(p.T, p.BT) * p.blocks
    dram, l2 = _partials(p.out)
    blocks = owners if p.CHUNKS == 1 and not p.TRANSPOSE else steps  # read: one is held where it serves the loop
    return p.work(nbytes(p.w, p.B, p.x) + dram, (p.num_stages - 1) * p.BC * p.BC * 2, l2 + blocks * p.BC * p.BC * 4,
                  trips=steps)  # fmt: skip


def _mix(p: Launch):
    dram, l2 = _partials(p.s)
    l2 += cdiv(p.T, p.BT) * nbytes(p.C)
    return p.work(nbytes(p.x, p.z, p.C) + dram, (p.num_stages - 1) * p.BT * p.BC * 2, l2,
                  trips=cdiv(p.T, p.BT) * cdiv(p.r, p.BE) * p.turns * p.CHUNKS)  # fmt: skip


def _mix_backward(p: Launch):
    dram, l2 = _partials(p.dC)
    moved = nbytes(p.g) * (1 + (p.C is not None)) + (nbytes(p.x) if p.dC is not None else 0.0)
    return p.work(dram + moved + nbytes(p.q), 2 * p.BT * p.BC * 2, l2 + p.n * nbytes(p.q), trips=p.n * cdiv(p.T, p.BT))


def _spmm(p: Launch):
    nnz, n = p.columns.numel(), p.row_offsets.numel() - 1
    steps = n * cdiv(p.T, p.BT) * cdiv(nnz // n, p.BE)
    return p.work(nbytes(p.x, p.columns, p.values["values"]) + 2 * nbytes(p.out), p.BT * p.BE * 2, nnz * p.T * 32.0,
                  trips=steps, prefix="LDG")  # fmt: skip


def _sddmm(p: Launch):
    return p.work(nbytes(p.x, p.dy, p.columns, p.out), p.BT * p.BE * 4, p.nnz * p.T * 32.0,
                  trips=cdiv(p.nnz, p.BE) * cdiv(p.T, p.BT), prefix="LDG")  # fmt: skip


def _turned_spmm(p: Launch):
    nnz, n, turned = p.columns.numel(), p.row_offsets.numel() - 1, nbytes(p.turned)
    steps = p.programs * cdiv(nnz, n)
    l2 = nnz * p.length * p.turned.element_size() + p.programs * p.BO * nnz / n * 8
    return p.work(2 * nbytes(p.out), p.BT * p.BO * 2, l2 + turned, trips=steps, prefix="FFMA")


def _turned_sddmm(p: Launch):
    """Entries of a row read it from L1 after the first, as they run side by side."""
    each = p.length * p.x.element_size()
    l2 = p.nnz * each + p.programs * 2 * each
    return p.work(nbytes(p.columns, p.out), 2 * p.BT * p.BE * 2, l2, trips=p.programs * p.length / p.BT, prefix="FFMA")


def _sectors(p: Launch, target: torch.Tensor, each: int):
    """Entries that touch a sector each, after a binary search."""
    return p.work(each * 32.0 * p.nnz + nbytes(p.columns), p.BE * 36, trips=p.programs * p.STEPS, prefix="LDG")


def _moments(p: Launch):
    n = p.exp_avg.numel()
    return p.work(20.0 * n, p.BLOCK * 12, moved=8.0 * n, prefix="STG")


def _vanishing(p: Launch):
    """Where nothing vanishes every program reads g and norm, and its loops over columns do not run."""
    p.outside = []
    return p.work(nbytes(p.g, p.norm), p.SCAN * 8, p.programs * 8.0 * p.d, moved=p.programs * 4.0 * p.d, prefix="LDG")


WORKS: dict[str, Callable[[Launch], tuple[Code, Work]]] = {
    "lowrank.matmul_kernel": _matmul_work,
    "lowrank.described_matmul_kernel": _matmul_work,
    "lowrank.update_kernel": _update,
    "lowrank.backward_kernel": _backward,
    "lowrank.outer_kernel": _lowrank_outer,
    "common.sum_partials_kernel": _sums,
    "dora.fingerprint_kernel": lambda p: p.work(nbytes(p.A, p.B) + 32.0 * p.w_n, 4 * p.BLOCK,
                                                moved=nbytes(p.A, p.B) + 4.0 * p.w_n, prefix="LDG"),
    "dora.norm_kernel": _norm,
    "dora.finish_kernel": lambda p: p.work(nbytes(p.out), p.BLOCK * p.RANGES * 4, nbytes(p.partial)),
    "dora.vanishing_kernel": _vanishing,
    "dora.magnitude_kernel": lambda p: p.work(nbytes(p.dyz, p.g, p.norm, p.bias, p.dm), p.BLOCK * 16),
    "dropout.project_kernel": _project,
    "dropout.outer_kernel": _outer,
    "dropout.lift_kernel": _lift,
    "dropout.dropout_kernel": lambda p: p.work(nbytes(p.x, p.out), p.BT * p.BK * 2),
    "segments.project_kernel": _segment_project,
    "segments.lift_kernel": _segment_lift,
    "segments.outer_kernel": _segment_outer,
    "segments.join_kernel": lambda p: p.work(0.0, p.BLOCK * 4),  # as many rows each: no adapter has several chunks
    "routing.combine_kernel": lambda p: p.work(nbytes(p.y, p.weights, p.places, p.out), p.K * p.BD * 2),
    "routing.combine_backward_kernel": _combine_backward,
    "blocksum.block_sum_kernel": _block_sum,
    "blocksum.block_tile_kernel": _block_tile,
    "bat.weight_kernel": _weight,
    "bat.contract_kernel": _contract,
    "bat.matmul_kernel": _few,
    "bat.mix_kernel": _mix,
    "bat.mix_backward_kernel": _mix_backward,
    "csr.scatter_kernel": lambda p: _sectors(p, p.out, 2),
    "csr.gather_kernel": lambda p: _sectors(p, p.dense, 1),
    "csr.spmm_kernel": _spmm,
    "csr.sddmm_kernel": _sddmm,
    "common.turn_kernel": lambda p: p.work(nbytes(p.x), p.BT * p.BK * 2, nbytes(p.turned)),
    "csr.turned_spmm_kernel": _turned_spmm,
    "csr.turned_sddmm_kernel": _turned_sddmm,
    "policy.logprob_kernel": lambda p: p.work(nbytes(p.logits), p.BLOCK * 2, moved=nbytes(p.logits), prefix="LDG"),
    "policy.gradient_kernel": lambda p: p.work(2 * nbytes(p.logits), p.BLOCK * 2),
    "cayley.cayley_kernel": lambda p: p.work(2 * nbytes(p.X), p.R * p.R * 4, trips=p.programs * p.r, prefix="SHFL"),
    "cayley.cayley_backward_kernel": lambda p: p.work(3 * nbytes(p.Q), p.STEP * p.R * 8,
                                                      trips=p.programs * 2 * cdiv(p.r, p.STEP)),
    "importance.moments_kernel": _moments,
    "importance.score_kernel": lambda p: p.work(0.0, 0.0, 8.0 * p.exp_avg.numel(), moved=8.0 * p.exp_avg.numel(),
                                                prefix="LDG"),
}  # fmt: skip


@dataclass
class Line:
    """A launch of the table."""

    launch: Launch
    time: Time
    work: Work

    def cells(self) -> list[str]:
        p, kinds = self.launch, Counter(op.split(".")[0] for op in self.launch.mix)
        wide = sum(op.startswith(("LDG.", "LDGSTS")) and ".128" in op for op in p.mix)
        mix = " ".join(f"{n} {name}" for name, n in kinds.most_common(5))
        return [f"{p.stem}.{p.kernel}", str(p.programs), str(p.threads), str(p.build.registers),
                f"{p.build.shared / 1024:.0f}", str(self.time.resident), f"{self.time.under_way / 1024:.0f}",
                p.build.product,
                str(len(p.mix) or len(p.outside)), str(wide), mix, self.time.bound,
                f"{1e6 * self.time.seconds:.1f}"]  # fmt: skip


def lines(operator: str, args: tuple) -> list[Line]:
    with aot.recorded(ARCH) as launches:
        aot.launcher(OPERATORS[operator].stem, operator)(*args)
    found = []
    Launch.summed = any(kernel.__name__ == "sum_partials_kernel" for kernel, *_ in launches)
    for recorded in launches:
        launch = Launch(*recorded)
        code, work = WORKS[f"{launch.stem}.{launch.kernel}"](launch)
        found.append(Line(launch, estimate(code, work, launch.programs, launch.threads, 0), work))
    return found


def row(case: Case, T: int, d: int, k: int) -> tuple[table.Row, list[Line]]:
    args = case.arguments(Make(T, d, k, "meta"))
    found = lines(case.operator, args)
    if case.operator == "column_norm_cached_":
        for line in found[1:]:  # which end at once
            line.time.seconds = 0.0
    kernels = [table.Kernel(f"{e.launch.stem}.{e.launch.kernel}", e.launch.build.registers, e.launch.build.shared,
                            e.launch.programs, e.launch.threads, e.time.resident, e.time.waves, e.time.under_way,
                            e.launch.build.product if "MMA" in e.launch.build.product else "", e.time.bound,
                            e.time.seconds) for e in found]  # fmt: skip
    seconds = RAMP + NEXT * (len(found) - 1) + sum(kernel.seconds for kernel in kernels)
    before = BEFORE.get((case.operator, case.label), "")
    return table.Row(
        "triton", case.operator, case.label, T, d, k, seconds, table.floor(case, args), kernels, before
    ), found


def compiled() -> Iterator[table.Row]:
    """A row for each case and size; on shapes alone, so none where the values decide what is to be done."""
    for case in ALL:
        for T, d, k in table.sizes(case):
            yield row(case, T, d, k)[0]


HEAD = ("case", "W", "us", "%", "kernel", "blocks", "threads", "regs", "KiB", "fit", "KiB/SM", "product", "loop",
        "16 B", "its most", "bound", "us alone")  # fmt: skip


def main(words: list[str]) -> None:
    """The table at the most tokens, a line for each launch; words filter the cases."""
    shown = []
    for case in ALL:
        for T, d, k in table.sizes(case):
            if T != table.TOKENS[0] or not all(word in f"{case.name} {d}x{k}" for word in words):
                continue
            made, found = row(case, T, d, k)
            for i, line in enumerate(found):
                own = [case.name, f"{d}x{k}", f"{1e6 * made.seconds:.1f}", f"{100 * made.share:.0f}"]
                shown.append([*(own if i == 0 else [""] * 4), *line.cells()])
    print(text(HEAD, shown))


if __name__ == "__main__":
    main(sys.argv[1:])
