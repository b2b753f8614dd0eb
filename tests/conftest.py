"""Settings of the test run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli_tools import Run

# a failing assertion in these shows its values, as one in a test file does
pytest.register_assert_rewrite("tests.family_checks", "tests.kernel_checks")


# The imports are in the functions: some tests begin before torch or a kernel is imported.


@pytest.fixture
def xattn(capfd: pytest.CaptureFixture[str]) -> Run:
    """`xattn-video` in this process."""
    from tests.cli_tools import tool

    return tool(capfd)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Wan pipeline."""
    from tests.cli_tools import save_tiny_wan

    return save_tiny_wan(tmp_path_factory.mktemp("model"))
