"""What the kernels' tests share."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture
def poisoned():
    """Fill what is allocated without a value with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
