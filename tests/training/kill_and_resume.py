"""Kill a run at random moments and resume it, until it is done; a process of its own.

It imports everything once and forks for each attempt, so that an attempt costs a tenth of a second.
The moments are random: half of them while a checkpoint is being written, half while none is.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from task_setup import numbers_of, task_run
from training_setup import metrics_of, run_config

from byheart.errors import CheckpointError
from byheart.models.checkpoint import load_model
from byheart.models.fingerprint import model_fingerprint
from byheart.training.config import RunConfig
from byheart.training.run import train
from byheart.training.task_config import TaskRunConfig
from byheart.training.task_files import load_task_run
from byheart.training.task_run import train_task

_DEADLINE = 30.0


def _train(run: RunConfig | TaskRunConfig, out: Path, **options) -> None:
    (train if isinstance(run, RunConfig) else train_task)(run, out, **options)


def _start(run: RunConfig | TaskRunConfig, out: Path, *, strict: bool) -> tuple[int, int]:
    """Fork a process that goes on with the run; its end of the pipe speaks when training begins."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stderr.fileno())

    def on_event(event: object) -> None:
        if event.kind == "start":
            os.write(writer, b"s")

    try:
        try:
            _train(run, out, resume=True, on_event=on_event)
        except CheckpointError:
            # only before the first checkpoint there may be none
            if strict:
                raise
            _train(run, out, overwrite=True, on_event=on_event)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _is_saving(out: Path, started: float) -> bool:
    """Tell whether there is an incomplete checkpoint, not counting those of earlier attempts."""
    for path in out.glob("checkpoint-*"):
        with contextlib.suppress(FileNotFoundError):
            if not (path / "manifest.json").exists() and path.stat().st_mtime >= started:
                return True
    return False


def _wait_for(pid: int, condition) -> bool:
    """Poll until the condition holds; `False` if the process has ended before."""
    end = time.monotonic() + _DEADLINE
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if condition():
            return True
        time.sleep(0.0003)
    raise TimeoutError


def _attempt(
    run: RunConfig | TaskRunConfig,
    out: Path,
    moments: random.Random,
    *,
    strict: bool,
    may_kill: bool,
):
    """Run until a random moment, or to the end."""
    started = time.time()
    pid, reader = _start(run, out, strict=strict)
    was_saving = False
    if may_kill:
        os.read(reader, 1)
        if moments.random() < 0.5:
            alive = _wait_for(pid, lambda: _is_saving(out, started))
            time.sleep(10 ** moments.uniform(-4, -1.5))
        else:
            time.sleep(moments.uniform(0, 0.5))
            alive = _wait_for(pid, lambda: not _is_saving(out, started))
        if alive:
            was_saving = _is_saving(out, started)
            os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(out.with_suffix(".log").read_text(encoding="utf-8"))
    return os.WIFSIGNALED(status), was_saving


def _stages_of(out: Path) -> list[str]:
    models = [load_task_run(out, stage=stage).memory_model for stage in (1, 2, 3)]
    return [model_fingerprint(model) for model in models]


def _require_equal(run: RunConfig | TaskRunConfig, whole: Path, out: Path) -> None:
    expected, found = metrics_of(whole), metrics_of(out)
    assert found == expected, f"{found} is not {expected}"
    if isinstance(run, RunConfig):
        models = [load_model(path / "model") for path in (whole, out)]
        assert (out / "result.json").read_text() == (whole / "result.json").read_text()
    else:
        models = [load_task_run(path).memory_model for path in (whole, out)]
        assert numbers_of(out) == numbers_of(whole)
        assert _stages_of(out) == _stages_of(whole)
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


def main() -> None:
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--task", action="store_true")
    options = parser.parse_args()
    folder, moments = options.folder, random.Random(options.seed)
    if options.task:
        run = task_run(curriculum={"keep_stages": True})
    else:
        run = run_config(
            folder, model={"dropout": 0.1}, max_steps=17, save_every=3, log_every=2,
            evaluate_every=4,
        )  # fmt: skip
    whole, out = folder / "whole", folder / "killed"
    _attempt(run, whole, moments, strict=False, may_kill=False)
    kills = saving = finished = 0
    while kills < options.kills or not finished:
        strict = any(out.glob("checkpoint-*/manifest.json"))
        killed, was_saving = _attempt(
            run, out, moments, strict=strict, may_kill=kills < options.kills
        )
        kills, saving = kills + killed, saving + was_saving
        if not killed:
            _require_equal(run, whole, out)
            finished += 1
            shutil.rmtree(out)
    sys.stdout.write(json.dumps({"kills": kills, "saving": saving, "finished": finished}))


if __name__ == "__main__":
    main()
