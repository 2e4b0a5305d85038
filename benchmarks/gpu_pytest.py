"""A plugin of pytest for gpu_tests.py: a line of JSON for each test as soon as it has ended.

Before them comes one with how many there are.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

LINES = "GPU_TESTS_LINES"  # environment: the file to append to
MESSAGE = 1500  # characters kept of a failure

_is_worker = False


def pytest_configure(config: Any) -> None:
    """Processes of pytest-xdist report to the first, which writes."""
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_collection_finish(session: Any) -> None:
    """All tests are known."""
    _write({"collected": len(session.items)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """All tests are known to a process of pytest-xdist; the first process looks for none."""
    _write({"collected": len(ids)})


def pytest_runtest_logreport(report: Any) -> None:
    """A test has run, or what comes before or after it has failed or skipped it."""
    if report.when == "call" or not report.passed:
        _write_report(report, round(report.duration, 2))


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported."""
    if report.failed:
        _write_report(report, 0.0)


def _write_report(report: Any, seconds: float) -> None:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    if len(text) > MESSAGE:
        text = f"{text[: MESSAGE // 3]}\n...\n{text[-2 * MESSAGE // 3 :]}"
    outcome = report.outcome
    _write({"name": report.nodeid, "kind": outcome, "message": text, "seconds": seconds})


def _write(line: dict[str, Any]) -> None:
    if _is_worker:
        return
    with open(os.environ[LINES], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
