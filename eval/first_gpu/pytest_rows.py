"""A pytest plugin that writes each test's outcome as it comes: what a run that is ended early has shown is not lost.

`python -m pytest -p xattn_video_eval.first_gpu.pytest_rows`, with the file's name in FIRST_GPU_TESTS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

from xattn_video_pipelines.common import jsonl

VARIABLE = "FIRST_GPU_TESTS"


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # of a test that passed only the call counts, of others the part that failed or was skipped
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        lines = [line for line in str(report.longrepr or "").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E ")] or lines[-1:]
        row = {"test": report.nodeid, "outcome": report.outcome, "reason": errors[0][:200] if errors else None}
        jsonl.append(self._path, [row])


def pytest_configure(config: pytest.Config) -> None:
    # the workers of pytest-xdist report to the first process, which writes
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(os.environ[VARIABLE])))
