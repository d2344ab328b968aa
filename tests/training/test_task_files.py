"""What a finished run that learned a task has left, and what is refused of it."""

import json
import shutil
from pathlib import Path

import pytest
from task_setup import task_run

from byheart.data.tokenize import BpeTokenizer
from byheart.errors import CheckpointError
from byheart.training.task_files import find_result, load_task_run
from byheart.training.task_run import train_task

RUN = task_run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_task(RUN, out)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    """A copy of it."""
    target = tmp_path / "run"
    shutil.copytree(whole, target)
    return target


def test_the_tokenizer_of_another_run_is_refused(out):
    BpeTokenizer.train(["Another text, other words."], 300).save(out / "tokenizer")
    saved = json.loads((out / "result.json").read_text())["tokenizer_fingerprint"]
    with pytest.raises(
        CheckpointError,
        match=rf"tokenizer must be the one of the run, {saved[:12]}, got [0-9a-f]{{12}}\. Put",
    ):
        load_task_run(out)


def test_a_result_from_before_tokenizers_were_named_is_read(out):
    content = json.loads((out / "result.json").read_text())
    del content["tokenizer_fingerprint"]
    (out / "result.json").write_text(json.dumps(content))
    assert load_task_run(out).run == RUN


def test_the_model_of_a_run_that_goes_on_is_not_read(out):
    (out / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"and result\.json\. Finish it with resume=True"):
        load_task_run(out)
    # there is nothing to go on with
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert load_task_run(out).run == RUN


def _cut_short(file: Path) -> None:
    file.write_text(file.read_text()[:50])


def _of_a_list(file: Path) -> None:
    file.write_text('["summary"]')


def _of_something_else(file: Path) -> None:
    file.write_text('{"model": null}')


DAMAGES = [_cut_short, _of_a_list, _of_something_else]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_a_damaged_file_is_named_when_a_result_is_sought(out, name, damage):
    damage(out / name)
    with pytest.raises(CheckpointError, match=rf"{name} must hold the \w+ of a run") as met:
        find_result(out, RUN)
    assert str(out / name) in str(met.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json"])
def test_a_damaged_file_is_named_when_a_run_is_loaded(out, name, damage):
    damage(out / name)
    with pytest.raises(CheckpointError, match=str(out / name)):
        load_task_run(out)


@pytest.mark.parametrize("damage", [_cut_short, _of_a_list])
def test_a_damaged_result_is_named_when_a_run_is_loaded(out, damage):
    damage(out / "result.json")
    with pytest.raises(CheckpointError, match=r"result\.json must hold the result of a run"):
        load_task_run(out)


def test_a_tokenizer_that_is_gone_is_named(out):
    shutil.rmtree(out / "tokenizer")
    with pytest.raises(CheckpointError, match=r"run/tokenizer must hold the tokenizer of the run"):
        load_task_run(out)
