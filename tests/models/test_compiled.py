"""Whole steps compile without a break, once, and compute the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled_steps.py"


# each way to mix, to say what is a token, and to have an XL cache at least once: a case compiles
# for seconds
TRAINING = ("known,joint,11", "whole,content gate,0", "unknown,gate,7")
DECODING = ("decode,gate,7", "decode,joint,11", "decode,whole memory,0")
HAS_COMPILER = shutil.which("c++") is not None
CHECKS = ("protection", "in place") if HAS_COMPILER else ("protection",)


@pytest.mark.slow
def test_compiled_steps_compute_the_same_refuse_the_same_and_write_in_place():
    # in one process, as starting it and importing the compiler takes longer than most cases
    command = [sys.executable, str(SCRIPT), *TRAINING, *DECODING, *CHECKS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    if not HAS_COMPILER:
        pytest.skip("all but writing in place was checked: Inductor needs a C++ compiler")
