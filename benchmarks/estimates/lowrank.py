"""How often the loops of the low-rank kernels run, and what they move."""

from __future__ import annotations

from math import ceil

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch
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


WORKS = {"update_mma": _update}
