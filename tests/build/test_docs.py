"""The examples of the documentation run as they stand, and its tables of costs are those of the formulas."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import publish
from spectral_ops.bench import counting, methods
from spectral_ops.cli import cost

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{i}")
    for page in sorted(DOCS.rglob("*.md"))
    for i, example in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs", "exec"), {})


def test_every_page_of_a_method_has_its_example_and_its_costs():
    pages = {page.stem: page.read_text() for page in (DOCS / "methods").glob("*.md")}
    assert len(pages) >= 6
    for name, text in pages.items():
        assert "```python" in text, name
    described = {name for text in pages.values() for name in re.findall(r"^<!-- cost: (\w+) -->$", text, re.M)}
    assert described == set(methods.METHODS)


def test_tables_of_costs_are_current():
    assert publish.write_costs(DOCS / "methods", write=False) == [], "python -m benchmarks.publish costs"


def test_costs_and_predictions_by_hand():
    """LoRA over a frozen layer: six skinny products; passes over x (twice), y and dx (in and out), and dy."""
    T, d, k, r = 4096, 1024, 4096, methods.RANK
    got, frozen = (counting.cost(name, T, d, k, torch.bfloat16) for name in ("lora", None))
    assert frozen.flops == 4 * T * d * k and frozen.bytes == 4 * (T * d + T * k + d * k)
    assert got.trained == r * (d + k) and got.saved_bytes == 2 * T * r
    assert got.flops - frozen.flops == 6 * T * r * (d + k)
    passes = 2 * (4 * T * k + 3 * T * d)
    assert passes <= got.bytes - frozen.bytes <= 1.03 * passes
    one, ceiling = counting.CEILINGS["sm_90"], (1.0, float("inf"))
    assert got.seconds(ceiling) == got.flops and got.seconds((float("inf"), 1.0)) == got.bytes
    assert max(got.flops / one[0], got.bytes / one[1]) <= got.seconds(one) <= got.flops / one[0] + got.bytes / one[1]
    text = cost.predictions(models=("smollm2",), tokens=(256,), methods=("lora",)).splitlines()
    assert len(text) == 3 and all(1 < float(cell) < 3 for cell in text[2].split()[3:])
