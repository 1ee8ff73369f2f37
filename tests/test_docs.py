"""The examples of the documentation run as they stand, and its tables of costs are those of the formulas."""

import re
from pathlib import Path

import pytest

from spectral_ops.cli import catalogue, cost

DOCS = Path(__file__).resolve().parents[1] / "docs"
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
    assert described == set(catalogue.METHODS)


def test_tables_of_costs_are_current():
    assert cost.write_docs(DOCS / "methods", write=False) == [], "python -m spectral_ops cost --write-docs docs/methods"
