"""How often the loops of the low-rank kernels run, and what they move."""

from __future__ import annotations

from math import ceil

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch, plan
from benchmarks.estimates.model import Work


def work(launch: Launch, case: Case, args: tuple) -> Work:
    name = launch.kernel.split("<")[0]
    return WORKS[name](launch, args)


def _update(launch: Launch, args: tuple) -> Work:
    """A warp has 32 rows by 32 columns of out at a time: 16 products for every 32 ranks. A block shares rows of h."""
    (T, d), r = args[0].shape, args[2].shape[1]
    out, h = 2 * T * d, 2 * T * r
    products = 16 * ceil(r / 32) * ceil(T / 32) * ceil(d / 32)
    return Work({"HMMA": products}, 2 * out + h + 2 * d * r, in_flight=launch.threads * 64, read=out + h,
                l2=h * ceil(d / 256))  # fmt: skip


BFLOAT16 = 2  # DType in csrc/kernels.h
# Bytes of a block's copies under way, by the tiles, halves and kind of its form: all stages of its queue but one.
QUEUES = {(2, 1, False): 48, (4, 1, False): 32, (4, 2, False): 24, (2, 1, True): 48, (4, 1, True): 32, (4, 2, True): 32}
IN_L2 = 50e6  # bytes of partial sums that are still there when the second kernel reads them


def _partial(args: tuple, chunks: int, splits: int) -> int:
    """Bytes of the partial sums of u for each chunk of columns, and of dB for each split of the rows."""
    (T, d), r = args[0].shape, args[2].shape[1]
    return 4 * r * (chunks * T + splits * d)


def _passes(args: tuple) -> int:
    """How often [T, d] elements cross memory: dy, and y and gdy where there are."""
    return 1 + (args[5] is not None) + bool(args[10])


def _plan(args: tuple) -> tuple[int, int]:
    """Chunks of columns and splits of rows."""
    (T, d), r = args[0].shape, args[2].shape[1]
    _, _, chunks, _, splits, *_ = plan("backward_plan", T, d, r, BFLOAT16, 1, 1, 0, args[5] is not None, args[10])
    return chunks, splits


def _backward(launch: Launch, args: tuple) -> Work:
    """A warp takes 16 rows in a step; h's fragments, which every step loads, tell how many there are."""
    (T, d), r = args[0].shape, args[2].shape[1]
    tiles, halves, everything = launch.kernel.split(", ")[1:4]
    chunks, splits = _plan(args)
    steps = launch.blocks * launch.threads // 32 * ceil(T / splits / 16)
    partial = _partial(args, chunks, splits)
    moved = 2 * T * d * _passes(args) + 2 * r * (T + d)
    reads = moved - (2 * T * d if args[10] else 0)
    beyond = partial if partial > IN_L2 else 0
    in_flight = 1024 * QUEUES[int(tiles), int(halves), everything == "true"]
    return Work(
        {"LDSM": steps * int(tiles) / 2}, moved + beyond, in_flight, reads, l2=partial - beyond + 2 * T * r * chunks
    )


def _hopper_plan(T: int, d: int) -> tuple[int, int, int]:
    """Columns of a block, clusters side by side and splits of rows (csrc/cuda/lowrank_wgmma.h)."""
    groups = 1
    while groups * 4 * 512 < d:
        groups *= 2
    columns = ceil(ceil(d / (4 * groups)) / 64) * 64
    groups = ceil(d / (4 * columns))
    return columns, groups, max(min(32 // groups, ceil(T / 256)), 1)


def _hopper(launch: Launch, args: tuple) -> Work:
    """64 rows in a step: of each block four warps for u, 16 for dB."""
    (T, d), r = args[0].shape, args[2].shape[1]
    columns, groups, splits = _hopper_plan(T, d)
    steps = launch.blocks * ceil(T / splits / 64)
    partial = _partial(args, groups, splits)
    return Work({"HGMMA": steps * 16 * 8, "ST.E.64": steps * 4 * 16}, 2 * T * d + 2 * r * (T + d), in_flight=36 * 1024,
                l2=partial + 8 * T * r * groups, flops=4.0 * T * d * 64,
                inner={"HGMMA": steps * 4 * 4 * (columns // 64 - 1)})  # fmt: skip


def _two_segment(launch: Launch, args: tuple) -> Work:
    """Tiles of 128 x 256 by steps of 64; two blocks share a tile of W. A turn of all blocks that is not whole costs a
    whole one, but of L2's bytes. x is read once; W, where L2 does not hold it, for every 2048 rows."""
    (T, k), (d, r) = args[0].shape, args[3].shape
    pairs, steps, parts = ceil(T / 256) * ceil(d / 256), ceil(k / 64), ceil(r / 16)
    tiles = ceil(pairs / (launch.blocks // 2)) * launch.blocks
    again = ceil(T / 2048) if 2 * d * k > IN_L2 else 1
    dram = 2 * (T * (k + r + d) + again * d * (k + r))
    l2 = 2 * pairs * (k + r) * (128 + 128) * 2
    products = 8 * tiles * (4 * steps + parts)  # of eight warps
    return Work({"UTMASTG": 8 * tiles * 4}, dram, in_flight=3 * 48 * 1024, read=dram - 2 * T * d, l2=max(l2 - dram, 0),
                flops=tiles * 2.0 * 128 * 256 * (64 * steps + 16 * parts), inner={"HGMMA": products})  # fmt: skip


def _reduce(launch: Launch, args: tuple) -> Work:
    (T, d), r = args[0].shape, args[2].shape[1]
    chunks, splits = _hopper_plan(T, d)[1:] if "wgmma" in launch.kernel else _plan(args)
    partial = _partial(args, chunks, splits)
    beyond = partial if partial > IN_L2 else 0
    return Work({}, 2 * T * r + 4 * d * r + beyond, in_flight=16 * launch.threads, read=beyond, l2=partial - beyond)


def _library(launch: Launch, args: tuple) -> Work:
    """A product of dy with a short side."""
    m, n, k = launch.product
    return Work({}, 2 * (m * n + n * k + m * k), in_flight=0)


WORKS = {
    "library": _library,
    "update_mma": _update,
    "backward_mma": _backward,
    "backward_wgmma": _hopper,
    "two_segment": _two_segment,
    "reduce": _reduce,
    "reduce_wgmma": _reduce,
}
