"""A pytest plugin: which tests a GPU took part in, how each ended, and a share of them for each of several processes.

pytest -p lab.gpu_record --record FILE [--share 0/8]

``FILE`` is written anew after every test, so that it holds what was found when the run is killed. A test ran on the GPU
if memory was allocated there while it ran.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="file for the record")
    parser.addoption("--share", default="0/1", help="I/N: every Nth test, from the Ith on")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("--record")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--share").split("/"))
    chosen = items[first::step]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def allocations() -> int:
    """How often memory was allocated on the GPU so far."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


class Recorder:
    """Keeps the record and writes it."""

    def __init__(self, path: Path):
        self.path = path
        self.found = {"chosen": 0, "passed": 0, "failed": 0, "skipped": 0, "on_gpu": 0, "seconds": 0.0, "failures": {}}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found["chosen"] = len(session.items)
        self.write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        before = allocations()
        result = yield
        self.found["on_gpu"] += allocations() > before
        self.write()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found["seconds"] += report.duration
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(crash.message if crash else report.longrepr).strip().splitlines()
            self.found["failures"][report.nodeid] = lines[0][:300] if lines else ""
            self.found["failed"] += 1
        elif report.skipped or report.when == "call":
            self.found[report.outcome] += 1

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self.path)
