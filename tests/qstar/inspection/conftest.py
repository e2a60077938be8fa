"""What the tests of both views share."""

from __future__ import annotations

import inspected
import pytest

from qstar.inspection.data import Inspection


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspected.ordinary()


@pytest.fixture(scope="module")
def hostile() -> Inspection:
    return inspected.hostile()
