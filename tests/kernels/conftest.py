"""What the kernels' tests share."""

import pytest
import torch
from torch.utils import deterministic

from qstar_kernels import cpu_products, products


@pytest.fixture
def poisoned():
    """Fill what is allocated without a value with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the products that oneDNN has made, ``(m, k, n)``."""
    made, multiply = [], products.multiply

    def recorded(a, b, *others):
        made.append((len(a), a.shape[1], len(b)))
        return multiply(a, b, *others)

    monkeypatch.setattr(products, "multiply", recorded)
    return made


@pytest.fixture
def by_onednn():
    """Whatever this machine would choose."""
    with cpu_products("onednn"):
        yield
