"""With --strict-skips a skip that allowed_skips.txt does not list is a failure, as in CI."""

from __future__ import annotations

from collections.abc import Generator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_name("allowed_skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    words = f"a skip that tests/{LIST.name} does not list is a failure"
    parser.addoption("--strict-skips", action="store_true", help=words)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    return _judged(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A module may be skipped whole."""
    return _judged(collector.config, (yield))


def _judged(config: pytest.Config, report: Any) -> Any:
    if config.getoption("--strict-skips") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1].removeprefix("Skipped: ")
        if not _is_allowed(report.nodeid, reason):
            report.outcome = "failed"
            report.longrepr = f"skipped ({reason}), which tests/{LIST.name} does not allow"
    return report


def _is_allowed(name: str, reason: str) -> bool:
    lines = LIST.read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return any(fnmatchcase(name, names) and fnmatchcase(reason, reasons) for names, reasons in rows)
