"""The cost model of lowrank_matmul's routes, by hand; test_native.py compares it with the one in C++."""

from __future__ import annotations

import math

import pytest

from spectral_ops.functional import lowrank_routes
from spectral_ops.functional.lowrank_routes import MatmulSizes, matmul_costs


@pytest.mark.parametrize(
    "rows,columns,inner,best",
    [
        (8192, 4096, 4096, "fused"),
        (8192, 14336, 4096, "fused"),
        (8192, 1024, 4096, "fused"),
        (8192, 4096, 14336, "update_first"),  # 3 % of so long a product is more than a write of y
        (512, 4096, 4096, "library"),
        (1, 4096, 4096, "library"),
    ],
)
def test_the_route(rows, columns, inner, best):
    assert matmul_costs(MatmulSizes(rows, columns, inner, 16)).best() == best
    assert matmul_costs(MatmulSizes(rows, columns, inner, 16, fused_runs=False)).best() in ("library", "update_first")


def test_seconds_by_hand():
    """8192x4096x4096: 1024 tiles are 8 waves of 132; y is 64 MiB."""
    costs = matmul_costs(MatmulSizes(8192, 4096, 4096, 16, triton_runs=True))
    product = 8 * 132 * 2 * 128 * 256 * 4096 / 7.9e14
    y, factors = 2**26 / 3e12, 2 * 16 * (8192 + 4096) / 3e12
    assert costs.library == pytest.approx(product + 2.5e-6 + 2 * y + factors)
    assert costs.update_first == pytest.approx(product + 2.5e-6 + 1.25 * y + factors)
    assert costs.fused == pytest.approx(product * (1 + 16 / 4096) / 0.97 + 1.5e-6)
    assert costs.triton == pytest.approx(product * (1 + 16 / 4096) / 0.75 + 1.5e-6)


def test_what_cannot_run_takes_for_ever():
    sizes = MatmulSizes(8192, 4096, 4096, 16)
    assert matmul_costs(sizes._replace(scaled=True)).update_first == math.inf
    assert matmul_costs(sizes._replace(tiled=True, triton_runs=True)).triton == math.inf
    assert matmul_costs(sizes._replace(fused_runs=False)).fused == math.inf
    assert matmul_costs(sizes._replace(rows=0)).best() == "library"


def test_the_fused_route_falls_back_where_waves_are_not_full():
    costs = matmul_costs(MatmulSizes(8192, 4096 + 8, 4096, 16))  # a 17th column of tiles for 8 columns
    assert not costs.fills and costs.best() != "fused"
    assert not matmul_costs(MatmulSizes(lowrank_routes.LEAST_ROWS - 1, 4096, 4096, 16)).fills
