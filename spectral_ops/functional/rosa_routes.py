"""Which route RoSA takes: a cost model over sizes and occupancy, with rates measured per device (METHODS 1.5).

    forward and dx   spmm:    4 T nnz products + 2 T (d + k) elements of slabs
                     scatter: 2 copies of W and nnz updates each
    dS               sampled: 2 T nnz products + T (d + k) elements of slabs
                     dense:   2 T d k products + nnz elements gathered
                     compact: the same over active rows and columns, after T (rows + columns) elements selected
The rates are in rates.json beside this file, with where they come from; ``python -m spectral_ops tune`` measures them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

ROUTES = ("resident", "scatter", "spmm")
GRADIENT_ROUTES = ("sampled", "dense", "compact")


class Rates(NamedTuple):
    """What a device does in a second, for one dtype."""

    product: float  # floating-point operations of the library's product
    sparse: float  # floating-point operations of spmm and of the sampled product
    slab: float  # elements of x and dy laid out for them
    copy: float  # elements of W copied
    gather: float  # entries read or written at the pattern
    select: float  # elements of selected columns
    launch: float  # seconds per kernel


def load(text: str) -> dict[str, dict[str, Rates]]:
    """Device type and dtype to rates, from the text of rates.json."""
    return {
        device: {dtype: Rates(**rates) for dtype, rates in entry["rates"].items()}
        for device, entry in json.loads(text).items()
    }


MEASURED = load((Path(__file__).parent / "rates.json").read_text())


def rates(device_type: str, dtype: torch.dtype) -> Rates:
    """The rates of a device; those of its float32 for another dtype, of the CPU for another device."""
    by_dtype = MEASURED.get(device_type, MEASURED["cpu"])
    return by_dtype.get(str(dtype).removeprefix("torch."), by_dtype["float32"])


def gradient_costs(T, d, k, nnz, active_rows, active_columns, r: Rates) -> dict[str, float]:
    """Seconds each route of dS is predicted to take."""
    gather = nnz / r.gather
    return {
        "sampled": 2 * T * nnz / r.sparse + T * (d + k) / r.slab + r.launch,
        "dense": 2 * T * d * k / r.product + gather + 2 * r.launch,
        "compact": 2 * T * active_rows * active_columns / r.product
        + T * (active_rows + active_columns) / r.select
        + gather
        + 4 * r.launch,
    }


def forward_costs(T, d, k, nnz, r: Rates) -> dict[str, float]:
    """Seconds S adds to a forward and its dx, by route."""
    return {
        "spmm": 4 * T * nnz / r.sparse + 2 * T * (d + k) / r.slab + 4 * r.launch,  # on a GPU S is listed first
        "scatter": 2 * d * k / r.copy + 2 * nnz / r.gather + 4 * r.launch,
        "resident": nnz / r.gather + r.launch,
    }


def _cheapest(costs: dict[str, float]) -> str:
    best, *others = costs
    for name in others:  # the compiler traces no min(key=...) of sizes that are symbols
        if costs[name] < costs[best]:
            best = name
    return best


def gradient_route(T, d, k, nnz, active_rows, active_columns, device_type, dtype) -> str:
    """The route of dS predicted fastest."""
    costs = gradient_costs(T, d, k, nnz, active_rows, active_columns, rates(device_type, dtype))
    return _cheapest(costs)


def forward_route(T, d, k, nnz, device_type, dtype, *, resident: bool = False) -> str:
    """The route of x (W + S)ᵀ predicted fastest; "resident" only where the caller may let W hold W + S."""
    costs = forward_costs(T, d, k, nnz, rates(device_type, dtype))
    if not resident:
        del costs["resident"]
    return _cheapest(costs)
