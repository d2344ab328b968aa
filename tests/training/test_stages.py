"""Models kept at every stage of a curriculum: what they are, and that no interruption shows."""

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
from task_setup import numbers_of, task_run
from training_setup import metrics_of

import byheart.memory.files
from byheart.errors import CheckpointError
from byheart.evaluation.segments import count_right
from byheart.models.fingerprint import model_fingerprint
from byheart.training.stages import kept_stages
from byheart.training.stop import TrainingInterruptedError
from byheart.training.task_files import load_task_run
from byheart.training.task_model import make_task
from byheart.training.task_run import train_task

KEEPING = {"keep_stages": True}
RUN = task_run(curriculum=KEEPING, training={"keep_checkpoints": 9})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_task(RUN, out)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    return out


def files_of(out: Path) -> dict[str, bytes]:
    folder = out / "stages"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


def reached(out: Path) -> list[dict]:
    return json.loads((out / "result.json").read_text())["stages"]


def forget_after(out: Path, step: int) -> None:
    """Leave what a run killed behind the checkpoint of a step would find."""
    for later in steps_of(out):
        if later > step:
            shutil.rmtree(out / f"checkpoint-{later}")


def test_the_model_of_a_stage_is_the_one_whose_evaluation_reached_it(whole):
    stages = reached(whole)
    assert kept_stages(whole) == tuple(stage["num_segments"] for stage in stages) == (1, 2, 3)
    fingerprints = set()
    for stage in stages:
        length = stage["num_segments"]
        trained = load_task_run(whole, stage=length)
        held_out = make_task(RUN, trained.task.tokenizer, is_training=False, seed=0)
        right = count_right(trained.memory_model, held_out, length, range(40), rows=3)
        assert right / 40 == stage["accuracy"]
        assert not trained.memory_model.training
        fingerprints.add(model_fingerprint(trained.memory_model))
    fingerprints.add(model_fingerprint(load_task_run(whole).memory_model))
    assert len(fingerprints) == 4


def test_keeping_stages_changes_nothing_else(whole, tmp_path):
    train_task(task_run(), tmp_path)
    assert not (tmp_path / "stages").exists()
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert numbers_of(tmp_path) == numbers_of(whole)


@pytest.mark.parametrize("index", range(4))
def test_a_resumed_run_has_the_stages_of_the_uninterrupted_one(whole, copy, index):
    # of stages whose steps come again nothing is trusted, nor of those that nothing knows of
    step = steps_of(copy)[index]
    forget_after(copy, step)
    past = [stage["num_segments"] for stage in reached(whole) if stage["step"] <= step]
    shutil.copytree(copy / "stages" / "3", copy / "stages" / "9")
    for length in {1, 2, 3} - set(past):
        (copy / "stages" / str(length) / "manifest.json").unlink()
    times = {length: (copy / "stages" / str(length)).stat().st_mtime_ns for length in past}
    train_task(RUN, copy, resume=True)
    assert files_of(copy) == files_of(whole)
    assert times == {n: (copy / "stages" / str(n)).stat().st_mtime_ns for n in past}


def test_a_run_killed_while_it_keeps_a_stage_keeps_it_when_it_comes_again(
    whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    replace = byheart.memory.files._replace

    def kill(new: Path, target: Path) -> None:
        if target.parent.name == "stages":
            # a process that is really killed does not tidy up
            shutil.copytree(new, new.with_name(f".{target.name}.partial-99999999"))
            raise Killed
        replace(new, target)

    with monkeypatch.context() as patch:
        patch.setattr("byheart.memory.files._replace", kill)
        with pytest.raises(Killed):
            train_task(RUN, tmp_path)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [".1.partial-99999999"]
    assert kept_stages(tmp_path) == ()
    train_task(RUN, tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole)


def test_stages_of_an_unfinished_run_can_be_loaded(whole, tmp_path):
    first = reached(whole)[0]["step"]

    def stop(event):
        if event.kind == "evaluation" and event.step == first:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError):
        train_task(RUN, tmp_path, on_event=stop)
    kept = load_task_run(tmp_path, stage=1).memory_model
    same = load_task_run(whole, stage=1).memory_model
    assert model_fingerprint(kept) == model_fingerprint(same)
    with pytest.raises(CheckpointError, match=r"must hold a finished run .*\. Finish it with"):
        load_task_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"model of stage 2, it has kept those of stages 1\."):
        load_task_run(tmp_path, stage=2)


def test_a_stage_that_is_not_there_is_refused_with_a_remedy(whole, tmp_path):
    with pytest.raises(CheckpointError, match=r"stage 4, it has kept those of stages 1, 2, 3\."):
        load_task_run(whole, stage=4)
    with pytest.raises(CheckpointError, match=r"stages none\. Train with curriculum.keep_stages"):
        load_task_run(tmp_path, stage=1)


def test_stages_that_are_past_cannot_be_kept_any_more(whole, tmp_path):
    out = tmp_path / "run"
    train_task(task_run(training={"keep_checkpoints": 9}), out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"keep_stages must be false .* the stages 1, 2, 3 without"
    ):
        train_task(RUN, out, resume=True)
    assert (out / "config.json").read_bytes() == before
    # from before the first stage on they can
    forget_after(out, reached(whole)[0]["step"] - 1)
    train_task(RUN, out, resume=True)
    assert files_of(out) == files_of(whole)


def test_a_run_resumed_without_keeping_leaves_what_was_kept(whole, copy):
    forget_after(copy, reached(whole)[2]["step"] - 1)
    train_task(task_run(), copy, resume=True)
    assert kept_stages(copy) == (1, 2)


def test_a_run_begun_anew_has_no_stages_of_the_one_before(copy):
    train_task(task_run(), copy, overwrite=True)
    assert not (copy / "stages").exists()


def test_a_full_disk_is_one_clear_error_and_the_run_can_go_on(whole, tmp_path, monkeypatch):
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"stages/1 could not be written: .*No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr("byheart.adapters.recurrent_saving.save_file", no_space)
        with pytest.raises(CheckpointError, match=message):
            train_task(RUN, tmp_path)
    assert kept_stages(tmp_path) == ()
    train_task(RUN, tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole)
