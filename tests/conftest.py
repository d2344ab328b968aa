"""Settings of the whole suite: poisoned memory, one thread, a fixed seed per test."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# without a GPU kernels run in Triton's interpreter, for which it decides when it is first imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples in every run: a red test is red for everyone
settings.register_profile("byheart", derandomize=True, deadline=None, database=None)
settings.load_profile("byheart")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """Fill uninitialised tensors with NaN, so that reading one cannot go unnoticed.

    The fill is part of torch's deterministic mode, which CUDA matrix products refuse without an
    environment variable: tests on a GPU run without it.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure():
    assert torch.utils.deterministic.fill_uninitialized_memory
