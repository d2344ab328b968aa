"""Makes `training_setup` importable, and collecting garbage fast."""

import gc
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="package")
def _frozen_modules():
    """Keep what is imported out of the garbage collections that every training begins with."""
    gc.freeze()
    yield
    gc.unfreeze()
