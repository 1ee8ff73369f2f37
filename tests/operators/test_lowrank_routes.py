"""The cost model of lowrank_matmul's routes, by hand; test_native.py compares it with the one in C++."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_ops import backends, explain
from spectral_ops._library import OPERATORS
from spectral_ops.functional import lowrank_routes
from spectral_ops.functional.lowrank_routes import MatmulSizes, describe, matmul_costs


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


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def call(T=8192, d=4096, k=4096, r=16, dtype=torch.bfloat16):
    return meta(T, k, dtype=dtype), meta(d, k, dtype=dtype), meta(T, r, dtype=dtype), meta(d, r, dtype=dtype)


def test_a_call_is_described_with_every_route():
    text = describe("lowrank_matmul", call(), (9, 0))
    assert text == "fused, 0.373 ms predicted for an H100; library 0.406, update_first 0.389, triton cannot"
    text = describe("lowrank_matmul", (*call(), 0.5, meta(4096), None), (9, 0), triton=True)
    assert text.startswith("fused, ") and "update_first cannot" in text and "triton 0.48" in text
    assert describe("block_matmul", call()[:3], (9, 0)).startswith("fused, 0.371 ms")
    x, W, h, B = call()
    assert describe("lowrank_matmul", (x, W.t().contiguous().t(), h, B), (9, 0)).startswith("fused")
    assert describe("lowrank_matmul", call(T=512), (9, 0)).endswith("leave too much of the chip idle")


@pytest.mark.parametrize(
    "args,capability,why",
    [
        (call(), (8, 0), "it wants compute capability 9.0, got 8.0"),
        (call(), (10, 0), "it wants compute capability 9.0, got 10.0"),
        (call(), None, "it wants compute capability 9.0, got none"),
        (call(dtype=torch.float32), (9, 0), "want 16 bits, got float32"),
        (call(r=257), (9, 0), "a rank of 256 at most, got 257"),
        (call(d=4100), (9, 0), "at multiples of 16 bytes"),
        ((meta(8192, 4097)[:, :4096], *call()[1:]), (9, 0), "at multiples of 16 bytes"),
        ((meta(4096, 8192).t(), *call()[1:]), (9, 0), "at multiples of 16 bytes"),
    ],
)
def test_what_the_fused_route_does_not_take(args, capability, why):
    text = describe("lowrank_matmul", args, capability)
    assert why in text and not text.startswith("fused")


def test_explain_names_the_route(monkeypatch):
    """On a GPU with the compiled operator it is the default, and tells its route."""
    operator = OPERATORS["lowrank_matmul"]
    monkeypatch.setattr(backends, "unavailable", lambda operator, backend, device: None if backend == "cuda" else "no")
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    assert backends.default(operator, "cuda").backend == "cuda"
    assert backends.default(operator, "cpu").backend == "library"
    assert backends.candidates(operator, "cuda")[:2] == ["cuda", "library"]
    monkeypatch.setattr(backends.tuning, "file", lambda device: None)
    choice = backends.choose(operator, device, call())
    assert choice.backend == "cuda" and "fused, 0.373 ms predicted" in choice.reason
    x, W, h, B = call()
    reason = backends._product_routes("lowrank_linear", (x, W, meta(16, 4096), B), device)
    assert reason.count("fused, 0.373 ms") == 2 and "; y: lowrank_matmul: cuda (" in reason
    reason = backends._product_routes("dora_linear", (x, W, meta(16, 4096), B), device)
    assert "update_first cannot" in reason and reason.count("fused, 0.373 ms") == 2  # y by g, dx without
    assert backends._product_routes("dora_linear", (x, W), device) == ""


def test_elsewhere_the_library_is_the_default():
    assert explain("lowrank_matmul", *(torch.zeros(t.shape) for t in call(16, 32, 32, 4))).backend == "library"


def test_a_forced_route_is_named(monkeypatch):
    monkeypatch.setenv("SPECTRAL_OPS_MATMUL", "fused")
    text = describe("lowrank_matmul", call(T=512), (9, 0))
    assert text.startswith("fused") and text.endswith("forced by SPECTRAL_OPS_MATMUL")
    refused = describe("lowrank_matmul", call(T=512), (8, 0))
    assert not refused.startswith("fused") and "forced" not in refused  # it cannot run
