"""The time of one launch on an H100 (SXM), from its resources, its instructions and its bytes.

The ceilings are assumptions, written down so that a measurement can refute them. Memory's rates and the clock are what
large copies and products reach. A unit's cycles per warp instruction are those of NVIDIA's throughput table for compute
capability 9.0. ``mma.sync`` at 62 % of the tensor cores' peak is what published microbenchmarks find.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9  # multiprocessors, warp schedulers of each, Hz
DRAM, L2, LATENCY = 3.0e12, 5.5e12, 800e-9  # bytes/s, bytes/s, seconds of a load while memory is busy
FLOPS = 7.9e14  # of 16-bit products
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32  # of a multiprocessor
RAMP, NEXT = 1.5e-6, 1.0e-6  # first loads and tail of an operator; each further launch, which waits for the one before
BANKS = 128  # bytes of shared memory in a cycle

# Cycles that a warp instruction keeps a unit of its scheduler busy.
UNITS = {
    "fma": (1.0, ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA2")),
    "imad": (2.0, ("IMAD",)),
    "alu": (2.0, ("IADD3", "ISETP", "LOP3", "PRMT", "SHF", "SEL", "FSEL", "FMNMX", "FSETP", "IMNMX", "VIMNMX", "LEA",
                  "F2FP", "I2FP", "PLOP3", "IABS", "VIADD", "POPC", "P2R", "R2P", "BMSK", "SGXT", "FCHK", "VIADDMNMX")),
    "tensor": (6.4, ("HMMA", "IMMA")),
    "movm": (4.0, ("MOVM",)),
    "xu": (8.0, ("MUFU", "F2F", "I2F", "F2I", "FRND")),
    "lsu": (4.0, ("LDS", "STS", "LDG", "STG", "LD", "ST", "LDGSTS", "LDSM", "STSM", "SHFL", "LDL", "STL")),
    "fp64": (2.0, ("DFMA", "DADD", "DMUL", "DSETP")),
}  # fmt: skip
UNIT_OF = {opcode: unit for unit, (_, opcodes) in UNITS.items() for opcode in opcodes}


@dataclass
class Code:
    """A compiled kernel: registers of a thread, static shared memory, and its loops' instructions."""

    registers: int
    shared: int
    loops: list[list[str]]  # of each loop, innermost or not, its opcodes with their modifiers

    def has(self, opcode: str) -> bool:
        return any(op.startswith(opcode) for loop in self.loops for op in loop)

    def loop(self, marker: str, inner: bool = False) -> list[str]:
        """The smallest loop among those with the most instructions that start with ``marker``; inner: with any."""
        counts = [sum(op.startswith(marker) for op in loop) for loop in self.loops]
        if not counts or not max(counts):
            raise LookupError(f"no loop with {marker}")
        most = 1 if inner else max(counts)
        return min((loop for loop, n in zip(self.loops, counts, strict=True) if n >= most), key=len)


@dataclass
class Work:
    """What a launch does in all, from the shape.

    loops: marker -> how many warp instructions that start with it all warps execute in their loop. It tells how often
    the loop around it runs, whatever was unrolled. inner: the same of innermost loops, besides.
    in_flight: bytes of a block's loads under way at any time.
    slots: issue slots of all warps besides their loops, counted by hand. tail: seconds after the last loop.
    flops: of wgmma, whose instructions are asynchronous, so that they count as arithmetic alone.
    """

    loops: dict[str, float]
    dram: float
    in_flight: float
    read: float | None = None  # of dram, what is loaded; None: all
    l2: float = 0.0  # what crosses L2 besides dram
    flops: float = 0.0
    slots: float = 0.0
    tail: float = 0.0
    inner: dict[str, float] = field(default_factory=dict)


@dataclass
class Time:
    """Seconds of a launch without its ramp, and what bounds it."""

    seconds: float
    bound: str
    limits: dict[str, float] = field(repr=False)
    resident: int = 0  # blocks on a multiprocessor
    waves: float = 0.0
    under_way: float = 0.0  # bytes of loads on a multiprocessor


def resident(registers: int, shared: int, threads: int) -> int:
    """How many blocks fit on a multiprocessor."""
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // of_warp) // warps  # each scheduler has a quarter of them
    by_shared = SHARED // (math.ceil((shared + 1024) / 128) * 128)  # a block's own kilobyte besides
    return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS)


def shared_cycles(opcode: str) -> int:
    """Cycles of a multiprocessor's shared memory that a warp instruction takes without bank conflicts."""
    name = opcode.split(".")[0]
    if name not in ("LDS", "STS", "LDGSTS", "LDSM", "STSM"):
        return 0
    if name in ("LDSM", "STSM"):
        return int(opcode[-1]) if opcode[-1].isdigit() else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def units(loop: list[str]) -> dict[str, float]:
    """Cycles that one pass of a warp over a loop keeps each unit of its scheduler busy, and the issue slots."""
    cycles: Counter[str] = Counter(issue=len(loop))
    for opcode in loop:
        if unit := UNIT_OF.get(opcode.split(".")[0]):
            cycles[unit] += UNITS[unit][0]
        cycles["shared"] += shared_cycles(opcode) * SCHEDULERS  # which the schedulers share
    return dict(cycles)


def estimate(code: Code, work: Work, blocks: int, threads: int, dynamic: int) -> Time:
    """The time of one launch of ``blocks`` blocks."""
    fit = resident(code.registers, code.shared + dynamic, threads)
    waves = blocks / (PROCESSORS * fit)
    whole = math.ceil(waves) / waves if waves > 1 else 1.0
    busiest = whole if waves > 1 else math.ceil(blocks / PROCESSORS) / (blocks / PROCESSORS)
    cycles: Counter[str] = Counter()
    cycles["issue"] += work.slots
    marked = [*((m, n, False) for m, n in work.loops.items()), *((m, n, True) for m, n in work.inner.items())]
    for marker, executed, inner in marked:
        loop = code.loop(marker, inner)
        passes = executed / sum(op.startswith(marker) for op in loop)
        for unit, each in units(loop).items():
            cycles[unit] += passes * each
    limits = {unit: busiest * n / (PROCESSORS * SCHEDULERS) / CLOCK for unit, n in cycles.items()}
    limits["dram"] = whole * work.dram / DRAM
    limits["L2"] = whole * (work.dram + work.l2) / L2
    under_way = min(blocks, PROCESSORS * fit) * work.in_flight
    read = work.dram if work.read is None else work.read
    limits["latency"] = whole * read * LATENCY / under_way if read else 0.0
    if work.flops:
        limits["wgmma"] = busiest * work.flops / FLOPS
    bound = max(limits, key=limits.get)
    return Time(limits[bound] + work.tail, bound, limits, fit, waves, under_way / PROCESSORS)
