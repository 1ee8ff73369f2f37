"""Dropout regenerated inside the products: the time of each operator of the row."""

import pytest

from benchmarks import harness


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("dropout"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)
