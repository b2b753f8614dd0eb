"""Sparse attention on tiny real pipelines of Wan 2.1 and 2.2, VACE, Animate, SkyReels-V2 and Helios."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.family_checks import CHECKS, check_id
from tests.tiny.common import Family
from tests.tiny.wan_family import WAN_FAMILIES


@pytest.mark.parametrize("check", CHECKS, ids=check_id)
@pytest.mark.parametrize("family", WAN_FAMILIES, ids=lambda family: family.name)
def test_family(family: Family, check: Callable[[Family], None]) -> None:
    check(family)
