"""How often the loops of DoRA's kernels run, and what they move."""

from __future__ import annotations

from math import ceil

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch, plan
from benchmarks.estimates.model import Work

BFLOAT16 = 2  # DType in csrc/kernels.h


def work(launch: Launch, case: Case, args: tuple) -> Work:
    name = launch.kernel.split("<")[0]
    if case.operator == "magnitude_grad":
        return MAGNITUDE[name](launch, args)
    unchanged = case.operator == "column_norm_cached_" and name != "prepare"  # the other kernels end at once
    return Work({}, 0, 0) if unchanged else NORM[name](launch, args[-4 if case.operator == "column_norm" else -5 :])


def _sizes(args: tuple) -> tuple[int, int, int]:
    W, A = args[:2]
    return *W.shape, len(A)


def _splits(d: int, k: int, r: int) -> int:
    return plan("norm_plan", d, k, r, BFLOAT16, 1, 0)[5]


def _sample(d: int, k: int) -> int:
    """Entries that a fingerprint reads of W [d, k], as WeightSample in csrc/ops/dora.h says."""
    spacing = 1 << max(min(d, k, d * k // 4096), 1).bit_length() - 1
    return d * ceil(k / spacing)


def _prepare(launch: Launch, args: tuple) -> Work:
    """A once, or A, B and a sector per entry of W's sample where there is a fingerprint. Each tile of A Aᵀ from the
    diagonal on reads 32 rows, in 670 issue slots for each of four warps and 128 columns; a warp's fingerprint of 512
    float32 values takes 593, that of 32 entries of the sample 110."""
    (d, k, r), A = _sizes(args), args[1]
    side = ceil(r / 16)
    stamped, sample = (r * (d + k), _sample(d, k)) if len(args) == 5 else (0, 0)
    read = A.element_size() * r * k + (args[2].element_size() * d * r if stamped else 0) + 32 * sample
    slots = side * (side + 1) // 2 * ceil(k / 128) * 4 * 670 + stamped / 512 * 593 + sample / 32 * 110
    return Work({}, read, in_flight=64 * launch.threads, l2=4 * r * k * (side + 1), slots=slots)


def _norm(launch: Launch, args: tuple) -> Work:
    """A warp has 32 rows by 32 columns of W at a time, times A's high halves and, where A is wider, its low ones."""
    (d, k, r), A = _sizes(args), args[1]
    tiles = int(launch.kernel.split(", ")[1].rstrip(">"))
    halves = 1 + (A.dtype != args[0].dtype)
    rows = 256 if tiles == 8 else 128
    splits = _splits(d, k, r)
    products = 4 * tiles * ceil(d / 32) * ceil(k / 32)
    partial = 4 * splits * d * (r + 1)
    return Work({"HMMA": products}, 2 * d * k, in_flight=128 * launch.threads, l2=partial + 4 * r * k * ceil(d / rows),
                inner={"HMMA": products * (halves - 1)})  # fmt: skip


def _finish(launch: Launch, args: tuple) -> Work:
    """A warp has four rows of W. The partial sums come back from L2, four splits in 62 issue slots; B and A Aᵀ are put
    into shared memory in some 400."""
    (d, k, r), B = _sizes(args), args[2]
    splits = _splits(d, k, r)
    slots = d / 4 * (splits / 4 * 62 + 400)
    return Work({}, B.element_size() * d * r, in_flight=64 * launch.threads, l2=4 * splits * d * (r + 1), slots=slots,
                inner={"FFMA": d * 64 * r / 32})  # fmt: skip


def _sums(launch: Launch, args: tuple) -> Work:
    """Every block looks for columns where m vanishes; for eight of them at a time x passes once."""
    _, dy, x, h, _, _, _, g, *_ = args
    (T, d), k = dy.shape, x.shape[1]
    found = int((g.abs() < 1 / 16384).sum())
    passes = ceil(found / 8)
    return Work({"FFMA": found * T * k / 32} if found else {}, 2 * T * k * passes + 32 * T * found + 8 * d,
                in_flight=64 * launch.threads, l2=8 * d * launch.blocks)  # fmt: skip


def _division(launch: Launch, args: tuple) -> Work:
    return Work({}, 16 * args[1].shape[1], in_flight=12 * launch.threads)


NORM = {"prepare": _prepare, "norm_mma": _norm, "norm_finish": _finish}
MAGNITUDE = {"magnitude_sums": _sums, "magnitude_division": _division}
