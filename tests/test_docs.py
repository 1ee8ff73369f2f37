"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

METHODS = (Path(__file__).resolve().parents[1] / "docs" / "METHODS.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", METHODS, re.S | re.M)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example):
    exec(compile(example, "docs/METHODS.md", "exec"), {})


def test_examples_were_found():
    found = "".join(EXAMPLES)
    assert "bat_linear" in found and "rosa_linear" in found
