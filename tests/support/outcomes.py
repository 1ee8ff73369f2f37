"""A pytest plugin: every outcome is written as it comes, so that a run cut off at its limit still says what failed.

    pytest -p tests.support.outcomes --outcomes FOLDER

tests.txt gets a line per test, failures.txt each failure's traceback. A process that lost the GPU would fail every
later test as well: it ends, and pytest-xdist puts another in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--outcomes", metavar="FOLDER", help="write each test's outcome there as it comes")


def pytest_configure(config):
    if config.getoption("outcomes"):
        config.pluginmanager.register(Worker() if hasattr(config, "workerinput") else Outcomes(config))


def lost() -> bool:
    """Whether this process's CUDA context refuses everything from now on."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Worker:
    @pytest.hookimpl(trylast=True)  # after the report went to the process that writes
    def pytest_runtest_logreport(self, report):
        if report.failed and lost():
            os._exit(70)


class Outcomes:
    def __init__(self, config):
        folder = Path(config.getoption("outcomes"))
        self.config, self.session, self.failed, self.started = config, None, set(), False
        self.tests, self.failures = (open(folder / name, "a", buffering=1) for name in ("tests.txt", "failures.txt"))

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_collection_finish(self, session):
        self._start(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self._start(len(ids))

    def _start(self, count):
        if not self.started:
            self.started = True
            self.tests.write(f"== {count} tests\n")

    def pytest_collectreport(self, report):
        if report.failed:
            self._fail(report)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._fail(report)
            if lost():
                self.session.shouldfail = "the CUDA context is lost: no later test can pass in this process"
        elif report.when == "call" or report.skipped:
            self.tests.write(f"{report.outcome:8}{report.duration:8.2f} {report.nodeid}\n")

    def _fail(self, report):
        if report.nodeid in self.failed:  # its teardown too, or the process that it ended
            return
        self.failed.add(report.nodeid)
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
        line = f"{report.nodeid}: {message}"
        self.tests.write(f"failed  {getattr(report, 'duration', 0):8.2f} {line}\n")
        self.failures.write(f"{report.nodeid}\n{report.longreprtext}\n\n")
        if reporter := self.config.pluginmanager.get_plugin("terminalreporter"):
            reporter.ensure_newline()
            reporter.write_line(f"FAILED {line}"[:300])
