"""Settings of the test run."""

from __future__ import annotations

import pytest

# a failing assertion in these shows its values, as one in a test file does
pytest.register_assert_rewrite("tests.family_checks", "tests.kernel_checks")
