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


def test_two_processes_with_replay_have_the_mean_of_the_gradients(script, tmp_path):
    cases = [{"replay": True}, {"replay": True, "bptt_depth": 2, "update": "gated"}]
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), str(tmp_path), json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for index, settings in enumerate(cases):
        # without replay
        usual = {name: value for name, value in settings.items() if name != "replay"}
        each = [script.gradients(script.make_model(usual), rank) for rank in (0, 1)]
        mean = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
        for rank in (0, 1):
            found = load_file(tmp_path / f"{index}-{rank}.safetensors")
            torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
