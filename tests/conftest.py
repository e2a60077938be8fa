"""Without a GPU, Triton's kernels run in its interpreter; it must be told before anything imports Triton."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # fixtures of modules, and the processes that tests start, have one thread as well

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and wait for them, up to tenfold, where others want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_finish():
    """Leave all that was imported out of later collections: accelerate asks for one after every run of training."""
    gc.collect()
    gc.freeze()
