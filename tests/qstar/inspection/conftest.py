"""What the tests of the views share."""

from __future__ import annotations

import inspected
import pytest
from browser import Browser

from qstar.inspection.comparison import Comparison
from qstar.inspection.data import Inspection


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspected.ordinary()


@pytest.fixture(scope="module")
def hostile() -> Inspection:
    return inspected.hostile()


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return inspected.compared()


@pytest.fixture(scope="module")
def hostile_compared() -> Comparison:
    return inspected.hostile_compared()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
