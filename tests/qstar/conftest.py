"""Tiny models all the way down: their passes take one thread, see ``one_thread``."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""
