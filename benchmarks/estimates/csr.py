"""How often the loops of the sparse products run, and what they move: the pattern that the arguments have says it."""

from __future__ import annotations

from math import ceil

import torch

from benchmarks.estimates.cases import Case
from benchmarks.estimates.launches import Launch
from benchmarks.estimates.model import Work

BLOCK, LANES = 512, 8  # columns of x in shared memory at a time; lanes that share an entry, for 64 tokens in 16 bits


def work(launch: Launch, case: Case, args: tuple) -> Work:
    return WORKS[launch.kernel.split("<")[0]](launch, args)


def _counts(offsets: torch.Tensor, columns: torch.Tensor, k: int, rows: int) -> torch.Tensor:
    """Entries by group of ``rows`` rows and block of columns."""
    d = len(offsets) - 1
    of_row = torch.repeat_interleave(torch.arange(d), offsets.diff().long()) // rows
    blocks = ceil(k / BLOCK)
    return torch.bincount(of_row * blocks + columns.long() // BLOCK, minlength=ceil(d / rows) * blocks).view(-1, blocks)


def _arrange(launch: Launch, args: tuple) -> Work:
    """Each block searches its rows once; what moves is the pattern and the list."""
    nnz = len(args[-2] if args[-1] is None else args[-1])
    return Work({}, 24 * nnz, in_flight=16 * launch.threads, read=12 * nnz)


def _spmm(launch: Launch, args: tuple) -> Work:
    """A warp has four rows of S at a time: they take as many pairs of entries as the longest has. The loop around has
    four pairs of each chunk, of which those that are not there are taken off. x is read again for every tile of rows,
    the list for every slab of tokens."""
    out, x, values, offsets, columns = args[:5]
    (T, d), k, nnz = out.shape, x.shape[1], len(values)
    slabs, blocks = ceil(T / 64), ceil(k / BLOCK)
    rows = int(launch.kernel.split(", ")[1])  # chunks of 64 that a block has
    pairs = slabs * int(((_counts(offsets, columns, k, 1).view(-1, 4, blocks).amax(1) + 1) // 2).sum())
    staged = launch.blocks * launch.threads // 32 * blocks  # turns of a warp
    tiles = ceil(d / (64 * rows))
    once = 2 * T * (2 * d + k) + 8 * nnz
    again = 2 * (tiles - 1) * T * k + slabs * (8 * nnz + 8 * d * blocks)
    return Work({"LDS.128": staged * 2 * 4 * rows}, once, in_flight=BLOCK * 128, l2=again,
                inner={"LDS.128": 2 * (pairs - 4 * rows * staged)})  # fmt: skip


def _sddmm(launch: Launch, args: tuple) -> Work:
    """A warp has 32 entries in a turn, eight for each of four groups, which share 256 rows by 512 columns."""
    dy, x, offsets, columns = args
    (T, d), k, nnz = dy.shape, x.shape[1], len(columns)
    slabs, blocks = ceil(T / 64), ceil(k / BLOCK)
    share = (_counts(offsets, columns, k, 256) + 31) // 32
    turns = launch.threads // 32 * slabs * int(((share + 7) // 8).sum())
    splits = max(launch.blocks // blocks, 1)
    again = 2 * T * d * (blocks - 1) + slabs * nnz * 12
    return Work({"LDS.128": 16 * turns}, 2 * T * (d + k) + 8 * nnz * splits, in_flight=96 * 1024, l2=again)


def _finish(launch: Launch, args: tuple) -> Work:
    return Work({}, 12 * len(args[3]), in_flight=4 * launch.threads)


WORKS = {"spmm_arrange": _arrange, "spmm_slab": _spmm, "sampled_arrange": _arrange, "sampled_product": _sddmm,
         "sampled_finish": _finish}  # fmt: skip
