"""What the Triton kernels share: devices, tile tables, the dropout mask, products, and the sum of partial results."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from spectral_ops import _library

INTERPRET = tl.constexpr(knobs.runtime.interpret)
# a name in TILES -> which number of a tile it changes, and how; products take 16 at least
VARIANTS: dict[str, tuple[int, Callable[[int], int]]] = {
    "short": (0, lambda n: max(n // 2, 16)),
    "tall": (0, lambda n: 2 * n),
    "narrow": (1, lambda n: max(n // 2, 16)),
    "wide": (1, lambda n: 2 * n),
    "shallow": (-1, lambda n: n - 1),
    "deep": (-1, lambda n: n + 1),
}
DESCRIPTORS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)  # older ones were not looked into
TURN = (64, 64, 4)  # rows, columns, warps
INTERPRETED_PROCESSORS = 4  # what the interpreter pretends to have, so that small tests split their work too
# the column and the processors of a GPU that is not here, while launches are recorded for it (see aot.py)
pretended: tuple[int, int] | None = None


def _mend_interpreter() -> None:
    """Triton's interpreter keeps scalars in arrays of one element, which NumPy 2.4 no longer takes for loop bounds."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if INTERPRET.value:
    _mend_interpreter()
_no_guard = contextlib.nullcontext()


# --- host side -------------------------------------------------------------------------------------------------------


def reference(name: str) -> Callable:
    """The reference overload of an operator: what runs on float64."""
    return _library.OPERATORS[name].overloads["reference"]


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current while kernels are launched; free of cost where it is already."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _no_guard
    return torch.cuda.device(x.device)


def column(major: int) -> int:
    """The column of the tile tables for a compute capability. 8.x and 12.x share one: it keeps to the 99 KiB of shared
    memory that the smallest of them has."""
    return {9: 90, 10: 100}.get(major, 80)


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 80 if torch.version.hip else column(properties.major), properties.multi_processor_count


def _device(x: torch.Tensor) -> tuple[int, int]:
    if pretended is not None:
        return pretended
    return _properties(x.get_device()) if x.is_cuda else (80, INTERPRETED_PROCESSORS)


def arch(x: torch.Tensor) -> int:
    """Which column of the tile tables serves x's device: 80 (any GPU), 90 or 100."""
    return _device(x)[0]


def processors(x: torch.Tensor) -> int:
    """Streaming multiprocessors of x's device."""
    return _device(x)[1]


def entry(table: Mapping[int | tuple[int, int], Any], architecture: int, size: int) -> Any:
    """The entry of a tile table for elements of ``size`` bytes: an architecture's own, or that of all others."""
    own = table.get((architecture, size))
    return table[size] if own is None else own


def tile(table: Mapping[int | tuple[int, int], Any], x: torch.Tensor, tiles: str = "") -> Any:
    """The entry of a tile table for x, or the variant ``tiles`` of it."""
    return varied(entry(table, arch(x), x.element_size()), tiles)


def varied(entry: Any, tiles: str) -> Any:
    """A tile as ``tiles`` changes it; itself where that is empty."""
    if not tiles:
        return entry
    place, change = VARIANTS[tiles]
    numbers = list(entry)
    numbers[place] = change(numbers[place])
    return tuple(numbers)


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time. Where not, every element takes an address: use small tiles."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def described(*tensors: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for each: aligned rows that do not overlap, and something in them."""
    return DESCRIPTORS and aligned(*tensors) and all(t.numel() and t.stride(0) >= t.shape[1] for t in tensors)


def with_workspace(device: torch.device, launch: Callable[[], object]) -> None:
    """Launch a kernel that asks for global memory, as descriptors made on the device do. It comes from torch, in stream
    order, so that graphs can be captured; the caller's own allocator stays set."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    contextvars.copy_context().run(run)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, low: int, high: int) -> int:
    """The least power of two that holds n, between low and high."""
    return max(low, min(high, 1 << max(n - 1, 0).bit_length()))


def split(chunks: int, programs: int, wanted: int) -> tuple[int, int]:
    """(ranges, chunks per range): cut ``chunks`` so that ranges * programs comes near ``wanted``, at least one each."""
    per_range = cdiv(chunks, max(1, min(chunks, wanted // max(programs, 1))))
    return cdiv(chunks, per_range), per_range


def threshold(p: float) -> int:
    """A word is kept where its upper 24 bits are at least this: exactly ``bits * 2**-24 >= p``."""
    return math.ceil(p * 2.0**24)


def strides(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()


_settled: set[int] = set()


def settle(function: object) -> None:
    """Have Triton hash a kernel after all that it calls, so that its key is the same in every process. Triton 3.6 adds
    the constants of a callee to a caller's hash only where the callee happens to have been hashed before."""
    if not isinstance(function, JITFunction) or id(function) in _settled:
        return
    _settled.add(id(function))
    for name in function.fn.__code__.co_names:
        settle(function.fn.__globals__.get(name))
        settle(getattr(tl, name, None))
    function.cache_key  # noqa: B018 (a property, which keeps what it computes)


# --- device side -----------------------------------------------------------------------------------------------------


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter holds bfloat16 as raw bits, which its product would take for integers."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even; the interpreter would truncate to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def wide_dot(a, b, acc, base: tl.constexpr, PARTS: tl.constexpr):
    """acc + a b where a factor may be wider than ``base``, and is not rounded to it. In half precision, two unlike
    factors each become a sum of bfloat16 numbers, whose exponents hold any float32: two (16 bits) or, for b and where
    PARTS is 3, three (all bits)."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return dot(a, b, acc, "ieee")
    elif base == tl.float32:
        return dot(a.to(tl.float32), b.to(tl.float32), acc, "ieee")
    else:
        high_a, low_a = _halved(a)
        high_b, low_b = _halved(b)
        if b.dtype != tl.bfloat16:
            if PARTS == 3:
                rest = b.to(tl.float32) - high_b.to(tl.float32) - low_b.to(tl.float32)
                acc = dot(high_a, narrow(rest, tl.bfloat16), acc, "ieee")
                if a.dtype != tl.bfloat16:
                    acc = dot(low_a, low_b, acc, "ieee")
            acc = dot(high_a, low_b, acc, "ieee")
        if a.dtype != tl.bfloat16:
            acc = dot(low_a, high_b, acc, "ieee")
        return dot(high_a, high_b, acc, "ieee")


@triton.jit
def _halved(x):
    """x as (high, low) in bfloat16; low is of no use where x is bfloat16."""
    if x.dtype == tl.bfloat16:
        return x, x
    else:
        high = narrow(x.to(tl.float32), tl.bfloat16)
        return high, narrow(x.to(tl.float32) - high.to(tl.float32), tl.bfloat16)


@triton.jit
def kept(seed, start, column, threshold, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Which of the elements ``start + column + [0, COLUMNS)`` dropout keeps: ``start`` [..., 1] int64, ``column`` any
    int that broadcasts with it. One Philox counter serves four elements where 4 divides start and column (ALIGNED);
    otherwise each element runs its own."""
    limit = threshold.to(tl.uint32)
    if ALIGNED and COLUMNS >= 4:
        first = (start + column) >> 2
        counter = first + _last_range(first, COLUMNS // 4)
        w0, w1, w2, w3 = _philox(seed, counter)
        return (tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> 8) >= limit
    else:
        e = start + column
        e += _last_range(e, COLUMNS)
        w0, w1, w2, w3 = _philox(seed, e >> 2)
        word = e & 3
        low, high = tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)
        return (tl.where(word < 2, low, high) >> 8) >= limit


@triton.jit
def _philox(seed, counter):
    """Philox4x32-10, as tl.randint4x(seed, counter) of int64 numbers is; its high and low products are one instruction
    here, and two there."""
    key, place = seed.to(tl.uint64, bitcast=True), counter.to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _last_range(like, N: tl.constexpr):
    """arange(N) shaped to broadcast along the last dimension of ``like`` [a, 1] or [a, b, 1]."""
    if len(like.shape) == 2:
        return tl.arange(0, N)[None, :]
    else:
        return tl.arange(0, N)[None, None, :]


@triton.jit
def _sum_job(block, partial, out, n, splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    total = tl.zeros([BLOCK], tl.float32)
    for s0 in range(0, splits, SPLITS):
        rows = (s0 + s).to(tl.int64)[:, None] * n
        live = ((s0 + s) < splits)[:, None] & (i < n)[None, :]
        total += tl.sum(tl.load(partial + rows + i[None, :], mask=live, other=0.0), 0)
    tl.store(out + i, narrow(total, out.dtype.element_ty), mask=i < n)


@triton.jit(do_not_specialize=["e0", "e1", "e2", "e3"])
def sum_partials_kernel(
    p0, o0, n0, s0, e0, p1, o1, n1, s1, e1, p2, o2, n2, s2, e2, p3, o3, n3, s3, e3,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Up to four jobs, out [n] = Σ_s partial [s, n]; job j owns the programs from e[j-1] up to e[j]."""
    block = tl.program_id(0)
    if block < e0:
        _sum_job(block, p0, o0, n0, s0, BLOCK, SPLITS)
    if p1 is not None:
        if (block >= e0) & (block < e1):
            _sum_job(block - e0, p1, o1, n1, s1, BLOCK, SPLITS)
    if p2 is not None:
        if (block >= e1) & (block < e2):
            _sum_job(block - e1, p2, o2, n2, s2, BLOCK, SPLITS)
    if p3 is not None:
        if block >= e2:
            _sum_job(block - e2, p3, o3, n3, s3, BLOCK, SPLITS)


def sum_partials(jobs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """out = Σ_s partial[s] for each of at most four (partial [s, ...], contiguous out), in a fixed order."""
    args, end = [], 0
    for partial, out in jobs:
        end += cdiv(out.numel(), 256)
        args += [partial, out, out.numel(), partial.shape[0], end]
    if end:
        args += [None, None, 0, 0, end] * (4 - len(jobs))
        sum_partials_kernel[(end,)](*args, BLOCK=256, SPLITS=16, num_warps=4)


@triton.jit(do_not_specialize=["T"])
def turn_kernel(x, turned, T, k, length, x_t, x_i, BT: tl.constexpr, BK: tl.constexpr):
    """turned [k, length] = xᵀ, with zeros for the rows from T on: nothing that reads it asks where they end."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    i = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    a = tl.load(x + t[:, None] * x_t + i[None, :] * x_i, mask=(t < T)[:, None] & (i < k)[None, :], other=0.0)
    tl.store(turned + i[:, None] * length + t[None, :], tl.trans(a), mask=(i < k)[:, None] & (t < length)[None, :])


def turned(x: torch.Tensor, length: int) -> torch.Tensor:
    """xᵀ [k, length], zeros from x's last row on."""
    (T, k), (BT, BK, warps) = x.shape, TURN
    out = x.new_empty(k, length)
    turn_kernel[(cdiv(length, BT), cdiv(k, BK))](x, out, T, k, length, *x.stride(), BT=BT, BK=BK, num_warps=warps)
    return out
