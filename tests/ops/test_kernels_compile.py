"""The kernels compile for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


# one of each generation, and of the first the one with the least shared memory
CAPABILITIES = ("86", "90", "100")


@pytest.mark.slow
def test_kernels_compile_and_fit_into_shared_memory(tmp_path):
    script = Path(__file__).with_name("kernels_compiled.py")
    # the interpreter, which the tests choose, compiles nothing
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script), *CAPABILITIES],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-4000:]
