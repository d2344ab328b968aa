"""Whole steps compile without a break, once, and compute the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled_steps.py"


# each way to mix, to say what is a token, and to have an XL cache at least once: a case compiles
# for ten seconds
TRAINING = ("known,joint,11", "whole,content gate,0", "unknown,gate,7")
DECODING = ("decode,gate,7", "decode,joint,11", "decode,whole memory,0")


def run(*cases):
    # in one process, as starting it takes longer than most cases
    command = [sys.executable, str(SCRIPT), *cases]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_a_compiled_training_step_computes_the_same():
    run(*TRAINING)


@pytest.mark.slow
def test_a_compiled_decoding_step_computes_the_same():
    run(*DECODING)


@pytest.mark.slow
def test_a_compiled_step_refuses_what_a_step_refuses():
    run("protection")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_commit_writes_rings_in_place():
    run("in place")
