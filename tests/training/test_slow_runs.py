"""Runs in processes of their own: killed at random moments, and split over two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_setup import task_run
from training_setup import metrics_of, run_config

from byheart.models.checkpoint import load_model
from byheart.training.run import train
from byheart.training.task_run import train_task

_HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def _python(*arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("kind", [(), ("--task",)])
def test_run_killed_at_twenty_random_moments_equals_the_uninterrupted_one(tmp_path, kind):
    script = str(_HERE / "kill_and_resume.py")
    summary = json.loads(_python(script, str(tmp_path), "--kills", "20", "--seed", "0", *kind))
    assert summary["kills"] == 20
    # it compares losses, weights and result itself
    assert summary["finished"] >= 1
    assert 3 <= summary["saving"] <= 17, summary


def test_two_processes_equal_one_with_all_rows(tmp_path):
    run = run_config(tmp_path, rows_per_device=4, max_steps=9, log_every=2, evaluate_every=4)
    one = train(run, tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _python(*launcher, str(_HERE / "two_processes.py"), str(tmp_path))
    assert (tmp_path / "was_stopped").exists()
    expected, found = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(found) == len(expected)
    for mine, other in zip(expected, found, strict=True):
        if "loss" in mine:
            assert other["loss"] == pytest.approx(mine["loss"], abs=1e-6)
        # sums are taken in another order, and Adam makes much of the smallest gradients
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-6)
    split = load_model(tmp_path / "two" / "model")
    for name, parameter in load_model(one.model_dir).named_parameters():
        torch.testing.assert_close(split.get_parameter(name), parameter, atol=1e-5, rtol=1e-5)


def test_two_processes_learn_a_task_like_one_with_all_documents(tmp_path):
    run = task_run(training={"rows_per_device": 4}, encoder={"dropout": 0.0}, memory={"noise": 0.0})
    one = train_task(run, tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _python(*launcher, str(_HERE / "two_task_processes.py"), str(tmp_path / "two"))
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["stages"] == one.to_dict()["stages"]
    expected, found = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(found) == len(expected)
    for mine, other in zip(expected, found, strict=True):
        # sums are taken in another order, and Adam makes much of the smallest gradients
        assert other == pytest.approx(mine, rel=1e-3, abs=1e-5)
