"""The cost model that chooses RoSA's routes: monotone, with the crossovers that its formulas promise, and its rates."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tensors import randn

from spectral_ops import CSR, rosa_linear
from spectral_ops.functional import rosa_routes

DEVICES = [(device, dtype) for device, by_dtype in rosa_routes.MEASURED.items() for dtype in by_dtype]
SIZES = [0, 1, 16, 1000, 100_000]
ONE = rosa_routes.Rates(*[1.0] * 6, launch=0.0)  # a second per operation: costs are counts


def all_costs(T, d, k, nnz, active_rows, active_columns, rates):
    return rosa_routes.gradient_costs(T, d, k, nnz, active_rows, active_columns, rates) | {
        f"forward {name}": cost for name, cost in rosa_routes.forward_costs(T, d, k, nnz, rates).items()
    }


def test_counts_by_hand():
    """T = 3, W [5, 7], 11 entries in 2 rows and 4 columns."""
    assert rosa_routes.gradient_costs(3, 5, 7, 11, 2, 4, ONE) == {
        "sampled": 2 * 3 * 11 + 3 * 12,
        "dense": 2 * 3 * 35 + 11,
        "compact": 2 * 3 * 8 + 3 * 6 + 11,
    }
    assert rosa_routes.forward_costs(3, 5, 7, 11, ONE) == {
        "spmm": 4 * 3 * 11 + 2 * 3 * 12,
        "scatter": 2 * 35 + 2 * 11,
        "resident": 11,
    }


@pytest.mark.parametrize("field", rosa_routes.Rates._fields)
def test_every_rate_counts(field):
    """A device that is slower at something finds some route dearer, and none cheaper."""
    rates = rosa_routes.rates("cpu", torch.float32)
    slower = rates._replace(**{field: getattr(rates, field) * (2 if field == "launch" else 0.5)})
    before, after = (all_costs(64, 512, 256, 4000, 400, 200, r) for r in (rates, slower))
    assert all(after[name] >= before[name] for name in before)
    assert any(after[name] > before[name] for name in before)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_costs_grow_with_every_size(device, dtype):
    rates = rosa_routes.MEASURED[device][dtype]
    base = {"T": 64, "d": 512, "k": 256, "nnz": 4000, "active_rows": 400, "active_columns": 200}
    for name in base:
        last = None
        for value in SIZES:
            costs = all_costs(**{**base, name: value}, rates=rates)
            assert all(math.isfinite(c) and c > 0 for c in costs.values())
            if last is not None:
                assert all(costs[route] >= last[route] for route in costs), (name, value)
            last = costs


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_crossovers(device, dtype):
    """As one size grows, each pair of routes changes places once at most: the choice never flips back."""
    dtype = getattr(torch, dtype)
    for T in (1, 16, 256, 1024, 8192):
        d = k = 2048
        chosen = []
        for density in (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0):
            nnz = int(density * d * k)
            active = [int(n * (1 - (1 - density) ** m)) for n, m in ((d, k), (k, d))]  # scattered at random
            chosen.append(rosa_routes.gradient_route(T, d, k, nnz, *active, device, dtype))
        runs = [name for name, _ in itertools.groupby(chosen)]
        assert len(runs) == len(set(runs)), (T, chosen)
        assert "dense" not in runs[:-1], (T, chosen)
        assert chosen[-1] == "dense" or T < 1024
        forward = [
            rosa_routes.forward_route(T, d, k, int(p * d * k), device, dtype) == "spmm" for p in (1e-5, 1e-3, 0.1, 1.0)
        ]
        assert forward == sorted(forward, reverse=True)
    by_tokens = [
        rosa_routes.forward_route(T, 4096, 4096, 100_000, device, dtype) for T in (1, 8, 64, 512, 4096, 65_536)
    ]
    assert by_tokens == sorted(by_tokens, key=("spmm", "scatter").index), by_tokens
    assert by_tokens[0] == "spmm", "few tokens: no copy of W"
    assert by_tokens[-1] == "scatter", "many tokens: one copy of W for all"


# Microseconds that "spmm" and "scatter" add to a forward and its dx on an H100, for the matrices of Llama-3-8B, 0.6 %,
# bfloat16: from the kernels' instructions, bytes and waves of blocks (csrc/cuda/csr_spmm.cu). Predicted, not measured.
PREDICTED = {
    (512, 4096, 4096): (52, 56),
    (512, 1024, 4096): (33, 22),
    (512, 14336, 4096): (146, 179),
    (512, 4096, 14336): (146, 179),
    (2048, 4096, 4096): (133, 56),
    (2048, 1024, 4096): (52, 22),
    (2048, 14336, 4096): (419, 179),
    (2048, 4096, 14336): (419, 179),
    (8192, 4096, 4096): (456, 56),
    (8192, 1024, 4096): (144, 22),
    (8192, 14336, 4096): (1491, 179),
    (8192, 4096, 14336): (1490, 179),
}


@pytest.mark.parametrize("sizes", PREDICTED, ids=str)
def test_auto_is_what_the_kernels_are_predicted_to_be_fastest_at(sizes):
    """On a GPU: spmm nowhere that a copy of W and the dense product alone are faster."""
    T, d, k = sizes
    spmm, scatter = PREDICTED[sizes]
    route = rosa_routes.forward_route(T, d, k, int(0.006 * d * k), "cuda", torch.bfloat16)
    assert route == ("spmm" if spmm < scatter else "scatter")
    costs = rosa_routes.forward_costs(T, d, k, int(0.006 * d * k), rosa_routes.rates("cuda", torch.bfloat16))
    for name, microseconds in (("spmm", spmm), ("scatter", scatter)):
        assert 0.5 < 1e6 * costs[name] / microseconds < 2, (name, costs)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_clustered_mask_is_compacted(device, dtype):
    """A tenth of the rows and of the columns hold everything: as dense a corner is a small dense product."""
    T, d, k = 8192, 4096, 4096
    nnz = (d // 10) * (k // 10)
    assert rosa_routes.gradient_route(T, d, k, nnz, d // 10, k // 10, device, getattr(torch, dtype)) == "compact"
    assert rosa_routes.gradient_route(T, d, k, nnz, d, k, device, getattr(torch, dtype)) != "compact"


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_extremes(device, dtype):
    dtype = getattr(torch, dtype)
    for T, d, k, nnz in itertools.product((0, 1, 10**7), (0, 1, 128_000), (0, 1, 128_000), (0, 1, 2**31 - 1)):
        for resident in (False, True):
            route = rosa_routes.forward_route(T, d, k, nnz, device, dtype, resident=resident)
            assert route in (rosa_routes.ROUTES if resident else ("spmm", "scatter"))
        assert (
            rosa_routes.gradient_route(T, d, k, nnz, min(d, nnz), min(k, nnz), device, dtype)
            in rosa_routes.GRADIENT_ROUTES
        )


def test_resident_is_chosen_only_where_it_is_allowed():
    for T in (1, 1000, 100_000):
        assert rosa_routes.forward_route(T, 4096, 4096, 10**5, "cpu", torch.float32) != "resident"
    assert rosa_routes.forward_route(4096, 4096, 4096, 10**5, "cpu", torch.float32, resident=True) == "resident"


@pytest.mark.parametrize("T", [0, 1, 300])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_auto_runs_what_it_chooses(T, density):
    csr = CSR.from_dense(torch.rand(30, 20) < density)
    csr = csr.with_values(randn(csr.nnz).requires_grad_())
    x, W = randn(T, 20).requires_grad_(), randn(30, 20)
    kept = W.clone()
    y = rosa_linear(x, W, csr)
    torch.testing.assert_close(y, x @ (W + csr.to_dense()).T)
    torch.autograd.grad(y.sum(), [x, csr.values])
    assert torch.equal(W, kept), "auto wrote into W"


# --- rates.json ------------------------------------------------------------------------------------------------------


def test_the_rates_are_complete():
    file = Path(rosa_routes.__file__).parent / "rates.json"
    data = json.loads(file.read_text())
    assert {"cpu", "cuda"} <= set(data)
    for device, entry in data.items():
        assert entry["source"].strip(), f"{device}: nobody knows where its rates come from"
        assert {"float32", "bfloat16"} <= set(entry["rates"])
        for dtype, rates in entry["rates"].items():
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert set(rates) == set(rosa_routes.Rates._fields), (device, dtype)
            assert all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in rates.values())
            assert rates["launch"] < 1e-3
    assert rosa_routes.load(file.read_text()) == rosa_routes.MEASURED


@pytest.mark.parametrize("spoil", [
    lambda rates: rates.pop("copy"), lambda rates: rates.update(speed=1.0),
])  # fmt: skip
def test_incomplete_rates_are_refused(spoil):
    data = json.loads((Path(rosa_routes.__file__).parent / "rates.json").read_text())
    spoil(data["cpu"]["rates"]["float32"])
    with pytest.raises(TypeError):
        rosa_routes.load(json.dumps(data))


def test_rates_of_what_was_not_measured():
    """Another dtype takes float32's, another device the CPU's."""
    cpu = rosa_routes.MEASURED["cpu"]
    assert rosa_routes.rates("cpu", torch.bfloat16) == cpu["bfloat16"]
    assert rosa_routes.rates("cpu", torch.float64) == cpu["float32"]
    assert rosa_routes.rates("xpu", torch.float32) == cpu["float32"]
    assert rosa_routes.rates("meta", torch.float64) == cpu["float32"]
