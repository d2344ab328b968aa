"""Whole steps compile without a break, once, and compute the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled_steps.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "cache"),
    [
        ("known", "gate", "7"),
        ("known", "joint", "11"),
        ("whole", "content gate", "7"),
        ("whole", "no memory", "0"),
        ("unknown", "gate", "7"),
    ],
)
def test_a_compiled_training_step_computes_the_same(kind, name, cache):
    run(kind, name, cache, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache"), [("gate", "7"), ("joint", "11"), ("no memory", "7"), ("whole memory", "0")]
)
def test_a_compiled_decoding_step_computes_the_same(name, cache):
    run("decode", name, cache, "aot_eager")


@pytest.mark.slow
def test_a_compiled_step_refuses_what_a_step_refuses():
    run("protection")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_commit_writes_rings_in_place():
    run("in place")
