"""Collects the tax table of every benchmark and prints it once, at the end."""

import pytest

from spectral_ops.bench.tables import layers_table

results = []


@pytest.fixture
def record():
    """Add measurements to the table printed at the end of the run."""
    return results.extend


def pytest_terminal_summary(terminalreporter):
    if results:
        terminalreporter.section("adapter tax (medians of interleaved turns, one run)")
        terminalreporter.write_line(layers_table(results))
