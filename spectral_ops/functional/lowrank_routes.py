"""Which way y = g * (x Wᵀ + scale h Bᵀ) + bias + tile goes on an H100: a cost model of waves and bytes.

    library       x Wᵀ, then a product that accumulates into y or, with g or tile, a pass of ours: reads and writes y
    update_first  y = scale h Bᵀ + bias, then x Wᵀ added to it (beta = 1): writes y, and its read is hidden in part
    fused         one GEMM over [x | h] (sm_90): FUSED_SHARE of the library's rate, and r more of the inner size
    triton        the same in Triton

Assumed, not measured. csrc/ops/lowrank_routes.h is the same arithmetic in the same order, and a test compares the two.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

ROUTES = ("library", "update_first", "fused", "triton")

PROCESSORS = 132  # multiprocessors, one tile on each at a time
PRODUCT_RATE = 7.9e14  # flop/s of the library's 128x256 tiles in full waves
MEMORY_RATE = 3.0e12  # bytes/s
FIRST_LAUNCH = 1.5e-6  # s: first loads and tail of an operator
NEXT_LAUNCH = 1.0e-6  # s: a further launch, which waits for the one before
FUSED_SHARE = 0.97  # of PRODUCT_RATE, our kernel in full waves
TRITON_SHARE = 0.75  # of PRODUCT_RATE, Triton's
EXPOSED_READ = 0.25  # share of the accumulator's read that a product of many waves does not hide
LEAST_ROWS = 1024  # below, our kernel is not taken: the library splits such products further
LEAST_FILL = 0.9  # of the waves' tiles that are wanted elements, for our kernel to be taken
TILE_ROWS, TILE_COLUMNS, CLUSTER_ROWS = 128, 256, 2  # of our kernel
MOST_RANK = 256  # that our kernel takes
DEPTH, STEP = 64, 16  # of a stage, and of one tensor-core instruction
ELEMENT = 2  # bytes
# rows, columns, share of PRODUCT_RATE in full waves
LIBRARY_TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 256, 0.85), (64, 128, 0.7), (64, 64, 0.5))


class MatmulSizes(NamedTuple):
    """Of y [rows, columns] with x [rows, inner], h [rows, r] (r = 0: none), in 16 bits."""

    rows: int
    columns: int
    inner: int
    r: int
    scaled: bool = False
    bias: bool = False
    tiled: bool = False
    fused_runs: bool = True
    triton_runs: bool = False


class MatmulCosts(NamedTuple):
    """Predicted seconds, infinite where a route cannot run; and whether the fused one fills its waves well enough."""

    library: float
    update_first: float
    fused: float
    triton: float
    fills: bool

    def best(self) -> str:
        """The route predicted fastest; the fused one only where it fills its waves."""
        found = "library"
        for route in ROUTES[1:]:
            if getattr(self, route) < getattr(self, found) and (self.fills or route != "fused"):
                found = route
        return found


def parts(size: int, part: int) -> int:
    return (size + part - 1) // part


def waves(rows: int, columns: int, tile_rows: int, tile_columns: int, cluster: int = 1) -> int:
    return parts(parts(rows, tile_rows * cluster) * cluster * parts(columns, tile_columns), PROCESSORS)


def wave_seconds(count: int, tile: int, depth: int, share: float) -> float:
    """Seconds of whole waves of tiles, each ``depth`` long, at ``share`` of the rate."""
    return float(count) * float(PROCESSORS * 2 * tile * depth) / (PRODUCT_RATE * share)


def byte_seconds(elements: int) -> float:
    return float(ELEMENT * elements) / MEMORY_RATE


def matmul_costs(s: MatmulSizes, fused_share: float = FUSED_SHARE) -> MatmulCosts:
    """Seconds that each route is predicted to take."""
    never = math.inf
    if s.rows <= 0 or s.columns <= 0:
        return MatmulCosts(0.0, never, never, never, False)
    depth = parts(s.inner, DEPTH) * DEPTH
    both = depth + parts(s.r, STEP) * STEP
    y = byte_seconds(s.rows * s.columns)
    floor = byte_seconds(s.rows * s.inner + s.columns * s.inner) + y
    factors = byte_seconds((s.rows + s.columns) * s.r)

    product, most = never, 1  # most: waves of the library's choice
    for tile_rows, tile_columns, share in LIBRARY_TILES:
        count = waves(s.rows, s.columns, tile_rows, tile_columns)
        seconds = wave_seconds(count, tile_rows * tile_columns, depth, share)
        if seconds < product:
            product, most = seconds, count
    product = max(product, floor) + FIRST_LAUNCH
    update = float(2 * s.rows * s.columns * s.r) / PRODUCT_RATE
    exposed = max(EXPOSED_READ, 1.0 / float(most))  # one wave hides none of it

    library = product
    if s.r > 0:
        library = library + (max(y + y + factors, update) + NEXT_LAUNCH)
    if s.tiled:
        library = library + (y + y + NEXT_LAUNCH)
    first = never  # g scales both products, so the update cannot come before the other; a tile is no product
    if not s.scaled and (s.r == 0 and not s.bias if s.tiled else s.r > 0):
        first = product + (max(y + y * exposed + factors, update) + NEXT_LAUNCH)

    count = waves(s.rows, s.columns, TILE_ROWS, TILE_COLUMNS, CLUSTER_ROWS)
    wanted = float(s.rows * s.columns)
    fills = s.rows >= LEAST_ROWS and wanted >= LEAST_FILL * float(count * PROCESSORS * TILE_ROWS * TILE_COLUMNS)
    tile, fused, triton = TILE_ROWS * TILE_COLUMNS, never, never
    if s.fused_runs:
        fused = max(wave_seconds(count, tile, both, fused_share), floor + factors) + FIRST_LAUNCH
    if s.triton_runs and not s.tiled:
        plain = waves(s.rows, s.columns, TILE_ROWS, TILE_COLUMNS)
        triton = max(wave_seconds(plain, tile, both, TRITON_SHARE), floor + factors) + FIRST_LAUNCH
    return MatmulCosts(library, first, fused, triton, fills)


# --- one call, for explain() -----------------------------------------------------------------------------------------


def _pitched(t: torch.Tensor, either_order: bool) -> bool:
    """Whether rows (or, with ``either_order``, columns) are contiguous and start at multiples of 16 bytes."""
    if t.storage_offset() % 8 != 0:
        return False
    orders = [(t.stride(0), t.stride(1), t.shape[1]), (t.stride(1), t.stride(0), t.shape[0])][: 1 + either_order]
    return any(inner == 1 and pitch % 8 == 0 and pitch >= size for pitch, inner, size in orders)


def fused_refuses(capability: tuple[int, int] | None, x: torch.Tensor, weight: torch.Tensor, r: int) -> str | None:
    """Why the fused kernel cannot run for a call, None where it can: as matmul_takes and matmul_runs in C++ have it."""
    if capability != (9, 0):
        got = "none" if capability is None else "{}.{}".format(*capability)
        return f"it wants compute capability 9.0, got {got}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it wants bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    if r > MOST_RANK:
        return f"it wants a rank of {MOST_RANK} at most, got {r}"
    if weight.shape[0] % 8 or not _pitched(x, False) or not _pitched(weight, True):
        return "it wants contiguous rows of x and y, and rows or columns of weight, at multiples of 16 bytes"
    return None


def describe(name: str, args: tuple, capability: tuple[int, int] | None, triton: bool = False) -> str:
    """The route of one call of ``lowrank_matmul`` or ``block_matmul`` by its arguments (the first tensors at least,
    else nothing is said), with every route's predicted time; what a call takes where no table has another choice."""
    tiled = name == "block_matmul"
    if len(args) < (3 if tiled else 4):
        return ""
    x, weight, third = args[:3]
    given = [a for a in args if a is None or isinstance(a, torch.Tensor)][3 if tiled else 4 :]
    g, bias = [*([None] if tiled else []), *given, None, None][:2]
    if x.element_size() != 2:
        return f"library; the other routes want 16 bits, got {str(x.dtype).removeprefix('torch.')}"
    r = 0 if tiled else third.shape[1]
    refused = fused_refuses(capability, x, weight, r)
    sizes = MatmulSizes(
        x.shape[0], weight.shape[0], x.shape[1], r, g is not None, bias is not None, tiled, refused is None, triton
    )
    costs = matmul_costs(sizes)
    best = matmul_costs(sizes._replace(triton_runs=False)).best()  # Triton only by a table or by force
    forced = os.environ.get("SPECTRAL_OPS_MATMUL")
    if forced in ROUTES[:3] and math.isfinite(getattr(costs, forced)):
        best = forced
    times = [f"{route} {1e3 * getattr(costs, route):.3f}" for route in ROUTES if route != best]
    times = [t.replace(" inf", " cannot") for t in times]
    text = f"{best}, {1e3 * getattr(costs, best):.3f} ms predicted for an H100; {', '.join(times)}"
    if best == forced:
        text = f"{text}; forced by SPECTRAL_OPS_MATMUL"
    if refused:
        return f"{text}; no fused route: {refused}"
    if costs.fills or best == "fused":
        return text
    return f"{text}; fused is not taken: its tiles would leave too much of the chip idle"


def layer_products(operator, scaled: bool, *tensors):
    """y and dx of a low-rank layer given x, weight, A and B, for explain(): a name, the operator, its arguments."""
    if len(tensors) < 4:
        return
    x, weight, A, B = tensors[:4]
    x = x.reshape(-1, x.shape[-1])
    dy, h = (torch.empty(x.shape[0], n, dtype=x.dtype, device="meta") for n in (weight.shape[0], A.shape[0]))
    g = torch.empty(weight.shape[0], device="meta") if scaled else None
    yield "y", operator, (x, weight, h, B, 1.0, g, None)
    yield "dx", operator, (dy, weight.t(), h, A.t(), 1.0, None, None)
