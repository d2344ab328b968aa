"""Replay under DistributedDataParallel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

_HERE = Path(__file__).parent
_SCRIPT = _HERE / "two_processes.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(_HERE)
    import two_processes

    yield two_processes
    sys.modules.pop("two_processes")


@pytest.mark.parametrize("settings", [{}, {"bptt_depth": 2, "update": "gated"}], ids=str)
def test_two_processes_with_replay_have_the_mean_of_the_gradients(settings, script, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    passed = json.dumps({"replay": True, **settings})
    done = subprocess.run(
        [sys.executable, *launcher, str(_SCRIPT), str(tmp_path), passed],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    each = []
    for rank in (0, 1):
        memory_model = script.make_model(settings)
        each.append(script.gradients(memory_model, rank))
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
