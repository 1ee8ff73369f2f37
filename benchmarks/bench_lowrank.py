"""LoRA: the layer's tax over the frozen layer beside PEFT's, and the time of each operator of the row."""

import pytest

from benchmarks import harness


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_tax(benchmark, record, dtype):
    harness.tax(benchmark, record, "lora", dtype)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("name", harness.operators("lowrank"))
def test_operator(benchmark, name, dtype):
    harness.operator(benchmark, name, dtype)
