"""Runs that learn a task: what they leave, how they are resumed, and how they end."""

import contextlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from task_setup import numbers_of, task_part, task_run
from training_setup import metrics_of

from byheart.config import load_config
from byheart.data.tasks import collate, draw_burn_in
from byheart.data.tasks.facts import is_direct, is_hard
from byheart.errors import CheckpointError, DataError
from byheart.evaluation.segments import evaluate_by_segments
from byheart.memory.files import load_directory
from byheart.models.fingerprint import model_fingerprint
from byheart.training import task_trainer
from byheart.training.burn_in import read_beginnings
from byheart.training.stages import kept_stages
from byheart.training.stop import TrainingInterruptedError
from byheart.training.task_config import TaskRunConfig
from byheart.training.task_files import load_task_run
from byheart.training.task_model import make_memory_model, make_task, make_tokenizer
from byheart.training.task_run import train_task
from byheart.training.task_trainer import TaskTrainer

RUN = task_run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_task(task_run(training={"keep_checkpoints": 9}), out)
    return out


def weights_of(out: Path) -> str:
    return model_fingerprint(load_task_run(out).memory_model)


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


def test_a_run_leaves_config_log_stages_and_model(whole):
    assert load_config(TaskRunConfig, whole / "config.json").task == RUN.task
    result = json.loads((whole / "result.json").read_text())
    assert result["outcome"] == "reached"
    assert [stage["num_segments"] for stage in result["stages"]] == [1, 2, 3]
    assert result["steps"] == result["stages"][-1]["step"] + RUN.curriculum.continue_steps
    assert [m["num_segments"] for m in result["evaluation"]["measurements"]] == [1, 2, 5]
    evaluations = [line for line in metrics_of(whole) if "evaluation/accuracy" in line]
    assert [line["evaluation/num_segments"] for line in evaluations][-1] == 3


@pytest.mark.parametrize("later", [0, 1, 2, 4])
def test_a_run_resumed_at_any_checkpoint_equals_the_uninterrupted_one(whole, tmp_path, later):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    steps = steps_of(out)
    # checkpoints lie before, at and behind the steps in which stages begin
    for step in steps[later:]:
        shutil.rmtree(out / f"checkpoint-{step}")
    if later == 0:
        train_task(RUN, out, overwrite=True)
    else:
        result = train_task(task_run(training={"keep_checkpoints": 9}), out, resume=True)
        assert result.resumed_from == steps[later - 1]
        optimizers = [
            torch.load(path / f"checkpoint-{steps[-1]}" / "optimizer.pt", weights_only=True)
            for path in (whole, out)
        ]
        for index, moments in optimizers[0]["state"].items():
            for name, tensor in moments.items():
                torch.testing.assert_close(
                    optimizers[1]["state"][index][name], tensor, atol=0, rtol=0
                )
    assert metrics_of(out) == metrics_of(whole)
    assert numbers_of(out) == numbers_of(whole)
    assert weights_of(out) == weights_of(whole)


def test_a_run_stopped_by_a_signal_goes_on_as_if_it_had_not_been(whole, tmp_path):
    def stop(event):
        if event.kind == "log" and event.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError, match="stopped by SIGTERM after step 6"):
        train_task(RUN, tmp_path, on_event=stop)
    train_task(RUN, tmp_path, resume=True)
    assert metrics_of(tmp_path) == metrics_of(whole)
    assert weights_of(tmp_path) == weights_of(whole)


def test_a_resumed_run_may_end_earlier_than_it_was_meant_to(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    saturated = json.loads((out / "result.json").read_text())["stages"][-1]["step"]
    for step in steps_of(out):
        if step > saturated:
            shutil.rmtree(out / f"checkpoint-{step}")
    sooner = train_task(task_run(curriculum={"continue_steps": 2}), out, resume=True)
    assert sooner.steps == saturated + 2
    assert train_task(task_run(curriculum={"continue_steps": 2}), tmp_path / "new").steps == (
        saturated + 2
    )
    assert metrics_of(out) == metrics_of(tmp_path / "new") != metrics_of(whole)


def test_the_rate_of_a_longer_stage_holds_at_once_resumed_or_not(tmp_path):
    run = task_run(training={"save_every": 4, "keep_checkpoints": 9, "log_every": 1})
    out, again = tmp_path / "run", tmp_path / "again"
    first, *_ = train_task(run, out).curriculum.reached
    shutil.copytree(out, again)
    for step in steps_of(again):
        if step > first.step:
            shutil.rmtree(again / f"checkpoint-{step}")
    assert train_task(run, again, resume=True).resumed_from == first.step
    rates, resumed = (
        {line["step"]: line["learning_rate"] for line in metrics_of(place) if "loss" in line}
        for place in (out, again)
    )
    assert rates == resumed
    # with documents of two segments at most, and length_decay=0.5
    after = first.step + 1
    assert rates[after] == pytest.approx(rates[first.step - 1] / 2**0.5)
    assert metrics_of(again) == metrics_of(out)


def test_the_rate_falls_at_once_as_it_would_have(tmp_path):
    def run(steps):
        training = {"save_every": 1, "keep_checkpoints": 99, "log_every": 1}
        return task_run(curriculum={"continue_steps": steps}, training=training)

    out = tmp_path / "run"
    saturated = train_task(run(5), out).curriculum.saturated_at
    for step in steps_of(out):
        if step > saturated + 1:
            shutil.rmtree(out / f"checkpoint-{step}")
    train_task(run(3), out, resume=True)
    train_task(run(3), tmp_path / "new")
    rates = [
        {line["step"]: line["learning_rate"] for line in metrics_of(place) if "loss" in line}
        for place in (out, tmp_path / "new")
    ]
    last = saturated + 3
    assert [rates[0][step] for step in (last - 1, last)] == [
        rates[1][step] for step in (last - 1, last)
    ]


def test_the_share_that_is_rewritten_is_logged_over_interruptions(tmp_path):
    # 5 and 3 do not divide each other: a log line spans a checkpoint
    run = task_run(memory={"update": "gated"}, training={"keep_checkpoints": 9})
    train_task(run, tmp_path / "whole")
    lines = [line for line in metrics_of(tmp_path / "whole") if "loss" in line]
    assert all(0 < line["write_share"] < 1 for line in lines)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in steps_of(tmp_path / "again")[1:]:
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    assert train_task(run, tmp_path / "again", resume=True).resumed_from == 3
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "whole")


def test_without_its_curriculum_the_resumed_run_would_be_another(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoint-{steps_of(out)[-1]}")
    restore = TaskTrainer._restore

    def forget(trainer, checkpoint):
        restore(trainer, checkpoint)
        trainer._begin()

    monkeypatch.setattr(TaskTrainer, "_restore", forget)
    # begun again at this step, the stages do not end in the steps that there are
    with contextlib.suppress(TrainingInterruptedError):
        train_task(RUN, out, resume=True)
    assert metrics_of(out) != metrics_of(whole)


def test_what_was_read_before_is_resumed_and_changes_what_is_learned(tmp_path):
    found, num_tokens = {}, {}
    for burn_in_segments in (0, 9):
        run = task_run(
            curriculum={
                "burn_in_segments": burn_in_segments, "burn_in_rows": 2, "burn_in_share": 1.0,
                "continue_steps": 6,
            },
            training={"keep_checkpoints": 9, "save_every": 2, "log_every": 1},
        )  # fmt: skip
        out = tmp_path / str(burn_in_segments)
        result = train_task(run, out)
        found[burn_in_segments] = weights_of(out)
        lines = [line for line in metrics_of(out) if "num_tokens" in line]
        num_tokens[burn_in_segments] = lines[-1]["num_tokens"]
    assert found[0] != found[9]
    # each of the two beginnings of a step is read once
    last = range(result.curriculum.saturated_at, result.steps)
    num_before = sum(result.curriculum.num_burn_in(run.training.seed, step) for step in last)
    assert num_tokens[9] - num_tokens[0] == 2 * num_before * run.segment_length > 0
    shutil.rmtree(out / f"checkpoint-{steps_of(out)[-1]}")
    shutil.rmtree(out / f"checkpoint-{steps_of(out)[-1]}")
    before = numbers_of(out)
    assert train_task(run, out, resume=True).resumed_from == steps_of(out)[-3]
    assert weights_of(out) == found[9]
    assert numbers_of(out) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reading_a_beginning_first_is_reading_the_document(precision):
    run = task_run(training={"precision": precision}, encoder={"init_std": 0.5})
    tokenizer = make_tokenizer(run)
    task = make_task(run, tokenizer.tokenizer, is_training=True)
    memory_model = make_memory_model(run, tokenizer, task.num_labels).eval()
    length = run.segment_length
    documents = draw_burn_in(
        task, range(5), (0,), num_beginnings=2, burn_in_segments=67, num_segments=2
    )
    state = read_beginnings(memory_model, documents, precision=precision)
    assert not state.memory.requires_grad
    whole = [
        np.concatenate([documents.beginnings[group].tokens(0, 67 * length), ending.tokens(0, 40)])
        for ending, group in zip(documents.endings, documents.groups, strict=True)
    ]
    endings = [ending.tokens(0, 40) for ending in documents.endings]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        one, two = (
            memory_model(torch.from_numpy(np.stack(rows).astype(np.int64)), state=before).logits
            for rows, before in ((whole, None), (endings, state))
        )
        alone = memory_model(torch.from_numpy(np.stack(endings).astype(np.int64))).logits
    close = {"rtol": 0, "atol": 1e-5 if precision == "float32" else 0.1}
    torch.testing.assert_close(two, one, **close)
    assert not torch.allclose(two, alone, **close)


def test_beginnings_of_documents_cut_from_the_end_are_refused():
    with pytest.raises(ValueError, match=r"burn_in_segments must be 0 for task.form='report'"):
        task_run(task={"form": "report"}, curriculum={"burn_in_segments": 8})


def test_what_is_kept_is_the_running_average_of_the_weights(tmp_path):
    training = {"save_every": 1, "keep_checkpoints": 99, "average_decay": 0.75}
    result = train_task(task_run(training=training), tmp_path)
    average = None
    for step in range(1, result.steps + 1):
        weights, _ = load_directory(tmp_path / f"checkpoint-{step}" / "model")
        if average is None:
            average = weights
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in weights}
    kept = dict(load_task_run(tmp_path).memory_model.named_parameters())
    assert kept.keys() == average.keys()
    for name, parameter in kept.items():
        torch.testing.assert_close(parameter.detach(), average[name])
    assert any((kept[name] != weights[name]).any() for name in kept)


def test_without_a_decay_the_weights_themselves_are_kept(tmp_path):
    result = train_task(task_run(training={"average_decay": 0.0}), tmp_path)
    last = tmp_path / f"checkpoint-{result.steps}"
    weights, _ = load_directory(last / "model")
    for name, parameter in load_task_run(tmp_path).memory_model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], atol=0, rtol=0)
    assert not (last / "average").exists()


def test_lessons_come_first_and_are_resumed(tmp_path, monkeypatch):
    seen = []
    count = task_trainer.count_right

    def counted(model, task, *arguments, **options):
        seen.append(all(is_hard(story) and is_direct(story) for story in task._stories))
        return count(model, task, *arguments, **options)

    monkeypatch.setattr(task_trainer, "count_right", counted)
    run = task_run(
        task={"name": "reason"}, window=43, curriculum={"lessons": True, "keep_stages": True},
        training={"keep_checkpoints": 9},
    )  # fmt: skip
    result = train_task(run, tmp_path / "whole")
    assert [e.lesson for e in result.curriculum.evaluations] == seen
    assert sorted(seen, reverse=True) == seen
    assert set(seen) == {True, False}
    stages = json.loads((tmp_path / "whole" / "result.json").read_text())["stages"]
    assert [(stage["num_segments"], stage["lesson"]) for stage in stages] == [
        (1, True), (2, True), (3, True), (1, False), (2, False), (3, False),
    ]  # fmt: skip
    assert kept_stages(tmp_path / "whole") == (1, 2, 3)
    assert "All 6 stages were reached" in result.summary
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in steps_of(tmp_path / "again")[1:]:
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    train_task(run, tmp_path / "again", resume=True)
    assert numbers_of(tmp_path / "again") == numbers_of(tmp_path / "whole")


def test_a_lesson_that_is_not_learned_or_cannot_be_is_said(tmp_path):
    run = task_run(
        task={"name": "reason"}, window=43, curriculum={"lessons": True, "advance_accuracy": 1.0}
    )
    result = train_task(run, tmp_path / "run")
    assert result.outcome == "not reached"
    assert result.summary.startswith("The lesson of 1 of 3 segments was not reached: after 8 steps")
    facts = tmp_path / "facts.jsonl"
    records = [
        {"facts": [f"A is {i}.", f"B is {i}."], "question": "Who?", "answer": f"a{i % 2}"}
        for i in range(40)
    ]
    facts.write_text("\n".join(map(json.dumps, records)))
    run = task_run(
        task={"name": "reason", "facts": str(facts)}, window=43, curriculum={"lessons": True}
    )
    with pytest.raises(ValueError, match="the train stories of name='reason' have none here"):
        train_task(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_in_bfloat16_trains_and_measures_in_it(tmp_path, monkeypatch):
    seen, count = set(), task_trainer.count_right

    def counted(model, *arguments, **options):
        seen.add((options["precision"], model.config._attn_implementation))
        return count(model, *arguments, **options)

    monkeypatch.setattr(task_trainer, "count_right", counted)
    # it makes outputs from mappings, which the type checks of the tests refuse
    monkeypatch.setattr("accelerate.accelerator.convert_outputs_to_fp32", lambda forward: forward)
    result = train_task(task_run(training={"precision": "bfloat16"}), tmp_path)
    assert result.outcome == "reached"
    # on a CPU without torch's fused attention, whose backward pass is slow there
    assert seen == {("bfloat16", "eager")}
    measured = numbers_of(tmp_path)["evaluation"]["measurements"]
    trained = load_task_run(tmp_path)
    again = evaluate_by_segments(
        trained.memory_model,
        trained.task,
        segments=trained.run.evaluation.segments,
        samples=trained.run.evaluation.samples,
        precision="bfloat16",
    )
    assert [m.num_right for m in again.measurements] == [m["num_right"] for m in measured]


def test_what_cannot_be_evaluated_is_refused_before_a_run_is_overwritten(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    missing = {
        "background": str(tmp_path / "train.txt"),
        "validation_background": str(tmp_path / "none.txt"),
    }
    (tmp_path / "train.txt").write_text("The boat waited near a bridge. Nobody came. " * 20)
    with pytest.raises(DataError, match=r"none\.txt"):
        train_task(task_run(task=missing), out, overwrite=True)
    assert weights_of(out) == weights_of(whole)


def test_a_finished_run_resumed_only_evaluates_again(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "model")
    train_task(replace(RUN, evaluation=replace(RUN.evaluation, segments=(4,))), out, resume=True)
    assert weights_of(out) == weights_of(whole)
    (measurement,) = numbers_of(out)["evaluation"]["measurements"]
    assert measurement["num_segments"] == 4


def test_a_stage_that_is_not_reached_is_said_and_can_be_given_more_time(tmp_path):
    impossible = {"advance_accuracy": 1.0}
    result = train_task(task_run(curriculum=impossible), tmp_path)
    assert (result.outcome, result.steps) == ("not reached", 8)
    assert "The stage of 1 of 3 segments was not reached: after 8 steps" in result.summary
    shorter = task_run(curriculum=impossible | {"stage_steps": 7})
    with pytest.raises(ValueError, match=r"stage_steps must be at least the 8 .* done, got 7\."):
        train_task(shorter, tmp_path, resume=True)
    longer = task_run(curriculum=impossible | {"stage_steps": 12})
    assert train_task(longer, tmp_path, resume=True).steps == 12
    assert train_task(longer, tmp_path / "whole").steps == 12
    assert metrics_of(tmp_path) == metrics_of(tmp_path / "whole")


def test_a_stage_that_ends_between_evaluations_goes_on_to_the_next_and_says_so(tmp_path):
    settings = {"advance_accuracy": 1.0, "stage_steps": 4, "evaluate_every": 3}
    result = train_task(task_run(curriculum=settings), tmp_path)
    assert (result.outcome, result.steps) == ("not reached", 6)
    assert "of 1 of 3 segments was not reached: after 6 steps the accuracy" in result.summary


def test_facts_that_do_not_fit_into_the_first_documents_are_refused(tmp_path):
    many = task_part(name="capacity", num_facts=9)
    with pytest.raises(
        ValueError, match=r"curriculum.min_segments must be at least the \d that hold"
    ):
        train_task(task_run(task=many), tmp_path)
    longer = {"min_segments": 5, "max_segments": 6}
    with pytest.raises(ValueError, match=r"evaluation.segments must be at least the \d that hold"):
        train_task(task_run(task=many, curriculum=longer), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path, caplog):
    class KilledError(Exception):
        pass

    def on_event(event):
        if event.kind == "start":
            raise KilledError

    with pytest.raises(KilledError):
        train_task(RUN, tmp_path, on_event=on_event)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet .* memory.noise 0.1, this run"):
        train_task(task_run(memory={"noise": 0.0}), tmp_path, resume=True)
    assert train_task(RUN, tmp_path, resume=True).resumed_from is None
    assert "no complete checkpoint yet: the run starts again at step 0" in caplog.text
    assert metrics_of(tmp_path) == metrics_of(whole)


def test_a_checkpoint_of_another_run_is_refused(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(CheckpointError, match=r"memory.noise 0.1, this run has 0.0"):
        train_task(task_run(memory={"noise": 0.0}), out, resume=True)
    with pytest.raises(ValueError, match=r"continue_steps must be at least the 3 .* done, got 2\."):
        train_task(task_run(curriculum={"continue_steps": 2}), out, resume=True)
    with pytest.raises(ValueError, match="must not hold a run already"):
        train_task(RUN, out)


def test_the_model_that_was_saved_is_the_one_that_was_measured(whole):
    trained = load_task_run(whole)
    again = evaluate_by_segments(
        trained.memory_model, trained.task, segments=(1, 2, 5), samples=7, rows=3
    )
    saved = numbers_of(whole)["evaluation"]["measurements"]
    assert [m.num_right for m in again.measurements] == [m["num_right"] for m in saved]


def test_a_pretrained_encoder_learns_with_its_own_tokenizer(pretrained, tmp_path):
    run = task_run(encoder=None, pretrained=str(pretrained), window=40)
    result = train_task(run, tmp_path / "run")
    assert result.steps > 0
    trained = load_task_run(tmp_path / "run")
    config = trained.memory_model.memory_config
    assert (config.start_ids, config.separator_ids, config.end_ids) == ((2,), (3,), (3,))
    assert {p.dtype for p in trained.memory_model.parameters()} == {torch.float32}
    # the run keeps its tokenizer, so that it can be measured without the folder
    assert "where is" in trained.task.sample(0, 1).text()


@pytest.mark.parametrize("dropout", [None, 0.0, 0.25])
def test_a_pretrained_encoder_drops_what_the_run_says(dropout, pretrained):
    run = task_run(encoder=None, pretrained=str(pretrained), window=40, pretrained_dropout=dropout)
    model = make_memory_model(run, make_tokenizer(run), 6).model
    expected = 0.1 if dropout is None else dropout  # BERT's own
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {expected}
    assert model.config.attention_probs_dropout_prob == expected
    assert model.config.num_labels == 6
    assert model.dtype == torch.float32


def test_a_window_beyond_the_encoder_is_refused(pretrained, tmp_path):
    run = task_run(encoder=None, pretrained=str(pretrained), window=41)
    with pytest.raises(ValueError, match="must fit into the window of 40 positions, got 41"):
        train_task(run, tmp_path / "run")


def test_held_out_facts_are_never_trained_on_and_the_last_evaluation_has_other_documents():
    tokenizer = make_tokenizer(RUN).tokenizer
    train = make_task(RUN, tokenizer, is_training=True)
    stages = make_task(RUN, tokenizer, is_training=False)
    final = make_task(RUN, tokenizer, is_training=False, seed=1)
    seen = {train.sample(i, 1).facts[0][1].tobytes() for i in range(300)}
    held_out = {stages.sample(i, 1).facts[0][1].tobytes() for i in range(300)}
    assert not seen & held_out
    assert stages.sample(0, 2).text() != final.sample(0, 2).text()


def test_writing_costs_nothing_before_the_last_stage_was_reached(tmp_path):
    weights = {}
    for steps in (0, 3):
        for cost in (0.0, 100.0):
            run = task_run(
                memory={"update": "gated"},
                training={"write_cost": cost},
                curriculum={"continue_steps": steps, "continue_segments": 4},
            )
            out = tmp_path / f"{steps}-{cost}"
            train_task(run, out)
            weights[steps, cost] = weights_of(out)
    assert weights[0, 0.0] == weights[0, 100.0]
    assert weights[3, 0.0] != weights[3, 100.0]


@pytest.mark.parametrize("architecture", ["modernbert", "bert"])
@pytest.mark.parametrize(
    "task", [task_part(name="reason"), task_part(name="detect", form="report")]
)
def test_every_token_of_the_documents_can_learn(task, architecture):
    encoder = {"architecture": architecture}
    run = task_run(task=task, encoder=encoder, memory={"update": "gated"}, window=40)
    tokenizer = make_tokenizer(run)
    documents = make_task(run, tokenizer.tokenizer, is_training=True)
    model = make_memory_model(run, tokenizer, documents.num_labels).train()
    batch = collate([documents.sample(index, 3) for index in range(4)])
    model(**batch).loss.backward()
    gradient = model.model.get_input_embeddings().weight.grad
    used = torch.unique(batch["input_ids"][batch["attention_mask"].bool()])
    assert (gradient[used].abs().sum(dim=1) > 0).all()
    for special in (tokenizer.start_id, tokenizer.separator_id):
        assert gradient[special].abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.memory.parameters())
