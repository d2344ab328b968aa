"""Whole runs from a config: what they leave behind, and what they refuse."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_setup import metrics_of, run_config, write_documents

from byheart.config import load_config
from byheart.data.tokenize import load_tokenizer
from byheart.errors import CheckpointError
from byheart.models.checkpoint import load_model
from byheart.models.fingerprint import model_fingerprint
from byheart.training.config import EvaluationConfig, RunConfig
from byheart.training.run import TrainResult, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder) -> RunConfig:
    return run_config(folder, max_steps=7, log_every=3)


@pytest.fixture(scope="module")
def events() -> list:
    return []


@pytest.fixture(scope="module")
def result(run, folder, events) -> TrainResult:
    return train(run, folder / "done", on_event=events.append)


@pytest.fixture
def out(result, tmp_path) -> Path:
    """A copy of the finished run."""
    target = tmp_path / "out"
    shutil.copytree(result.out_dir, target)
    return target


def test_a_run_leaves_everything_needed_to_use_and_repeat_it(run, result):
    out = result.out_dir
    names = {path.name for path in out.iterdir()} - {"tensorboard"}
    assert names == {
        "checkpoint-6", "checkpoint-7", "config.json", "metrics.jsonl", "model", "result.json",
        "tokenizer",
    }  # fmt: skip
    saved = load_config(RunConfig, out / "config.json")
    assert saved == replace(run, model=replace(run.model, vocab_size=257))
    tokenizer = load_tokenizer(out / "tokenizer")
    decoder = load_model(result.model_dir, tokenizer_fingerprint=tokenizer.fingerprint)
    assert decoder.config == run.model.resolve(257)
    assert model_fingerprint(decoder) == model_fingerprint(
        load_model(out / "checkpoint-7" / "model")
    )


def test_result_says_what_came_out(result):
    assert (result.steps, result.resumed_from) == (7, None)
    *_, last_log, evaluation = metrics_of(result.out_dir)
    assert result.loss == last_log["loss"]
    assert result.num_tokens == last_log["num_tokens"]
    assert result.evaluation["nats_per_token/memory_23"] > 0
    assert {f"evaluation/{name}": value for name, value in result.evaluation.items()} == {
        name: value for name, value in evaluation.items() if name != "step"
    }
    saved = json.loads((result.out_dir / "result.json").read_text())
    assert saved["loss"] == result.loss
    assert saved["evaluation"] == result.evaluation
    assert saved["versions"].keys() == {"byheart", "torch", "transformers"}


def test_events_tell_the_story(result, events):
    kinds = [event.kind for event in events if event.kind != "tokenize"]
    assert kinds == [
        "start", "log", "checkpoint", "log", "checkpoint", "log", "checkpoint", "evaluation", "end"
    ]  # fmt: skip
    assert events[0].kind == "tokenize"
    assert [event.step for event in events if event.kind == "checkpoint"] == [3, 6, 7]


def test_evaluation_measures_the_sizes_asked_for(folder, tmp_path):
    evaluation = EvaluationConfig(memory_sizes=(0, 5), rows=2, max_tokens=17)
    run = replace(run_config(folder, max_steps=2, evaluate_every=1), evaluation=evaluation)
    result = train(run, tmp_path / "out")
    assert {"perplexity/memory_0", "perplexity/memory_5"} <= result.evaluation.keys()
    assert (
        sum("evaluation/perplexity/memory_0" in line for line in metrics_of(tmp_path / "out")) == 2
    )


def test_without_validation_nothing_is_evaluated(folder, tmp_path):
    run = run_config(folder, max_steps=2)
    run = replace(run, data=replace(run.data, validation=None))
    assert train(run, tmp_path).evaluation == {}


def test_an_evaluation_that_cannot_be_done_is_refused_before_the_first_step(folder, tmp_path):
    run = run_config(folder, model={"knn_memory": None})
    run = replace(run, evaluation=EvaluationConfig(memory_sizes=(5,)))
    with pytest.raises(ValueError, match=r"without kNN memory can only be measured with .* size 0"):
        train(run, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_evaluating_without_documents_is_warned_about(folder, tmp_path, caplog):
    run = run_config(folder, max_steps=2, evaluate_every=1)
    train(replace(run, data=replace(run.data, validation=None)), tmp_path)
    assert "training.evaluate_every has no effect without data.validation" in caplog.text


def test_loss_that_is_not_a_number_leaves_valid_json(folder, tmp_path):
    run = run_config(folder, model={"knn_memory": None}, max_steps=3, learning_rate=1e30)
    run = replace(run, data=replace(run.data, validation=None))
    assert math.isnan(train(run, tmp_path).loss)
    assert json.loads((tmp_path / "result.json").read_text())["loss"] == "nan"


def test_a_run_is_not_overwritten_unasked(run, out):
    with pytest.raises(
        ValueError, match=r"must not hold a run already, found config\.json\. Go on"
    ):
        train(run, out)
    with pytest.raises(ValueError, match="resume and overwrite cannot both be True"):
        train(run, out, resume=True, overwrite=True)


def test_overwrite_removes_the_run_and_nothing_else(run, out):
    (out / "notes.txt").write_text("mine")
    short = replace(run, training=replace(run.training, max_steps=2, save_every=2))
    train(short, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((out / "result.json").read_text())["steps"] == 2


def test_a_wrong_config_does_not_harm_the_run_it_would_overwrite(run, out):
    before = sorted(path.name for path in out.iterdir())
    wrong = replace(run, model=replace(run.model, vocab_size=300))
    with pytest.raises(ValueError, match=r"model\.vocab_size must be the tokenizer's 257, got 300"):
        train(wrong, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before


def test_resume_after_the_last_step_finishes_the_run(run, result, out):
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    resumed = train(run, out, resume=True)
    assert resumed == replace(result, out_dir=out, model_dir=out / "model", resumed_from=7)
    weights = [model_fingerprint(load_model(path / "model")) for path in (out, result.out_dir)]
    assert weights[0] == weights[1]
    assert metrics_of(out) == metrics_of(result.out_dir)


def test_an_evaluation_that_failed_after_the_last_step_is_made_up(run, result, out, monkeypatch):
    # as if the evaluation had failed, or the process had died, when the checkpoint was complete
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(out / "model")
    assert train(run, out, resume=True).evaluation == result.evaluation
    assert metrics_of(out) == metrics_of(result.out_dir)


def test_a_removed_log_does_not_keep_a_finished_run_from_its_result(run, result, out, caplog):
    (out / "metrics.jsonl").unlink()
    resumed = train(run, out, resume=True)
    assert math.isnan(resumed.loss)
    assert resumed.num_tokens is None
    assert resumed.evaluation == result.evaluation
    assert "metrics.jsonl has no log line: loss and tokens read are unknown" in caplog.text
    assert json.loads((out / "result.json").read_text())["num_tokens"] is None


def test_learning_a_vocabulary_is_reported_before_it_begins(folder, tmp_path):
    run = run_config(folder, max_steps=1)
    run = replace(run, data=replace(run.data, tokenizer="bpe:270"))
    events = []
    train(run, tmp_path, on_event=events.append)
    assert (events[0].kind, events[0].values["stage"]) == ("tokenize", "learn")


def test_resume_in_the_middle_gives_the_same_result(run, result, out):
    shutil.rmtree(out / "checkpoint-7")
    # what the first call wrote is as good as the config that the user gives
    resumed = train(load_config(RunConfig, out / "config.json"), out, resume=True)
    assert resumed == replace(result, out_dir=out, model_dir=out / "model", resumed_from=6)
    assert metrics_of(out) == metrics_of(result.out_dir)


def test_resume_without_checkpoints_says_so(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold a complete checkpoint\. There is none"):
        train(run, tmp_path / "nothing", resume=True)


class KilledError(Exception):
    """Stands for a kill: nothing that the run catches."""


def kill_at(kind):
    def on_event(event):
        if event.kind == kind:
            raise KilledError

    return on_event


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_a_run_killed_before_its_first_checkpoint_starts_again(run, tmp_path, caplog, tokenizer):
    run = replace(run, data=replace(run.data, tokenizer=tokenizer))
    with pytest.raises(KilledError):
        train(run, tmp_path / "killed", on_event=kill_at("log"))
    # cut short, as by a kill while it was written
    (tmp_path / "killed" / "checkpoint-3").mkdir()
    saves_more = replace(run, training=replace(run.training, save_every=2))
    resumed = train(saves_more, tmp_path / "killed", resume=True)
    assert "no complete checkpoint yet: the run starts again at step 0" in caplog.text
    assert resumed.resumed_from is None
    train(run, tmp_path / "whole")
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_a_run_without_a_checkpoint_is_not_begun_again_with_another_config(run, tmp_path):
    with pytest.raises(KilledError):
        train(run, tmp_path, on_event=kill_at("start"))
    other = replace(run, training=replace(run.training, learning_rate=0.5))
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint yet and was begun with training.learning_rate 0.003, this run has "
        r"0.5\. Resume with",
    ):
        train(other, tmp_path, resume=True)


def test_a_finished_run_whose_checkpoints_are_gone_is_not_begun_again(run, out):
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=r"must hold a complete checkpoint\. There is none"):
        train(run, out, resume=True)
    assert (out / "model").is_dir()


def test_resume_with_fewer_steps_than_done_is_refused(run, out):
    short = replace(run, training=replace(run.training, max_steps=5))
    with pytest.raises(ValueError, match=r"at least the 7 steps of .*checkpoint-7, got 5"):
        train(short, out, resume=True)


def test_resume_with_more_steps_warns_that_the_schedule_is_another(run, out, caplog):
    longer = replace(run, training=replace(run.training, max_steps=8))
    assert train(longer, out, resume=True).steps == 8
    assert "max_steps was 7 and is 8" in caplog.text


def test_resume_with_another_tokenizer_model_or_corpus_is_refused(run, out, tmp_path):
    before = (out / "config.json").read_bytes()
    other = write_documents(tmp_path / "other", seed=3)
    for changed, message in (
        (replace(run, data=replace(run.data, tokenizer="bpe:270")), "; tokenizer [0-9a-f]{12}, "),
        (replace(run, data=replace(run.data, train=str(other))), "made with documents [0-9a-f]"),
        (replace(run, model=replace(run.model, num_heads=2)), "model.num_heads 3, this run has 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(changed, out, resume=True)
    assert (out / "config.json").read_bytes() == before
    assert (out / "metrics.jsonl").exists()


def test_bpe_is_learned_once_and_kept(folder, tmp_path, monkeypatch):
    run = run_config(folder, max_steps=4, save_every=2)
    run = replace(run, data=replace(run.data, tokenizer="bpe:270"))
    first = train(run, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert load_model(first.model_dir).config.vocab_size == tokenizer.vocab_size == 270
    shutil.rmtree(tmp_path / "checkpoint-4")
    monkeypatch.delattr("byheart.data.tokenize.BpeTokenizer.train")
    assert train(run, tmp_path, resume=True) == replace(first, resumed_from=2)
