"""How often block_sum's and block_tile_'s loops run, and what they move."""

from __future__ import annotations

from math import ceil

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch
from benchmarks.estimates.model import Work


def work(launch: Launch, case: Case, args: tuple) -> Work:
    first, size = args[0], args[0].element_size()
    T, columns = first.shape
    wide = T * ceil(columns * size / 16) / 32  # warp accesses of 16 bytes a thread, each element once
    if case.operator == "block_sum":
        moved = size * T * (columns + args[1])
        return Work({"LDG.E.128": wide}, moved, in_flight=16 * 8 * launch.threads, read=size * T * columns)
    moved = size * T * (2 * columns + args[1].shape[1])
    return Work({"LDGSTS": wide}, moved, in_flight=16 * 4 * launch.threads, read=size * T * columns)
