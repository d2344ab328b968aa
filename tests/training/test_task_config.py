"""Configs of runs that learn a task: what fits together, and what is refused."""

import math
from dataclasses import replace

import pytest
from task_setup import task_run

from byheart.config import apply_overrides, from_dict, to_dict
from byheart.training.task_config import TaskPart, TaskRunConfig


def test_a_segment_is_what_memory_and_special_tokens_leave_of_the_window():
    run = TaskRunConfig(name="run", task=TaskPart(name="memorize"))
    assert (run.window, run.segment_length) == (64, 51)
    # the report's BERT
    run = apply_overrides(run, ["window=512", "encoder=null", "pretrained=folder"])
    assert run.segment_length == 499


def test_a_config_survives_json():
    run = task_run(task=TaskPart(name="reason", form="report"), training={"schedule": "cosine"})
    assert from_dict(TaskRunConfig, to_dict(run)) == run


def test_the_report_aligns_to_the_right_and_clean_documents_can_be_streamed():
    memory = task_run().memory
    assert memory.resolve(9, "report").alignment == "right"
    assert memory.resolve(9, "clean").alignment == "left"


def test_special_tokens_stand_where_the_report_has_them():
    config = task_run().memory.resolve(9, "clean", start_ids=(5,), separator_ids=(6,))
    assert (config.start_ids, config.separator_ids, config.end_ids) == ((5,), (6,), (6,))


def test_only_training_asks_more_than_one_question():
    splits = ("train", "validation")
    assert [TaskPart(name="reason").resolve(9, s).num_questions for s in splits] == [4, 1]
    assert TaskPart(name="reason", form="report").resolve(9, "train").num_questions == 1
    assert TaskPart(name="reason", num_questions=2).resolve(9, "train").num_questions == 2
    assert TaskPart(name="detect").resolve(9, "train").num_questions == 1


def test_only_training_has_documents_that_end_anywhere():
    splits = ("train", "validation")
    assert [TaskPart(name="reason").resolve(9, s).any_length for s in splits] == [True, False]
    assert [TaskPart(name="detect").resolve(9, s).any_length for s in splits] == [False, False]
    assert not TaskPart(name="reason", form="report").resolve(9, "train").any_length
    assert TaskPart(name="detect", any_length=True).resolve(9, "train").any_length


def test_only_training_has_strangers_namesakes_and_more_stories():
    part = TaskPart(name="detect", strangers=0.25, namesakes=0.5, more_stories=True)
    train, validation = (part.resolve(9, split) for split in ("train", "validation"))
    assert (train.strangers, train.namesakes, train.more_stories) == (0.25, 0.5, True)
    assert (validation.strangers, validation.namesakes) == (0.0, 0.0)
    assert not validation.more_stories
    with pytest.raises(ValueError, match=r"more_stories must be false .*, got background='x'"):
        replace(part, background="x", validation_background="y")
    with pytest.raises(ValueError, match=r"strangers must be 0 for form='report', got 0\.25"):
        TaskPart(name="detect", form="report", strangers=0.25)


def test_only_training_has_fragments():
    part = TaskPart(name="detect", fragments=0.25)
    assert [part.resolve(9, split).fragments for split in ("train", "validation")] == [0.25, 0.0]
    assert TaskPart(name="detect").resolve(9, "train").fragments == 2
    assert TaskPart(name="detect", form="report").resolve(9, "train").fragments == 0
    with pytest.raises(ValueError, match=r"fragments must be 0 for form='report', got 0\.25"):
        TaskPart(name="detect", form="report", fragments=0.25)


def test_a_depth_may_be_as_long_as_the_longest_documents():
    for settings in (["memory.bptt_depth=3"],
                     ["memory.bptt_depth=5", "curriculum.continue_segments=5"]):  # fmt: skip
        assert apply_overrides(task_run(), settings).memory.bptt_depth == int(settings[0][-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["encoder=null"], "Either encoder or pretrained must be given, got none"),
        (["pretrained=folder"], "Either encoder or pretrained must be given, got both"),
        (["window=6"], "window must be at least 7: 3 memory tokens, 3 special tokens"),
        (["encoder.num_heads=4"], "embed_dim must be a multiple of 8 for 4 heads of modernbert"),
        (
            ["encoder.num_heads=5", "encoder.architecture=bert"],
            "encoder: embed_dim must be a multiple of 5 for 5 heads of bert, got 12",
        ),
        (["encoder.num_local_layers=1"], "num_local_layers must be between 0 and 0 for 1 layers"),
        (
            ["encoder.num_local_layers=1", "encoder.architecture=bert", "encoder.num_layers=3"],
            "num_local_layers must be between 0 and 0 for 3 layers of bert, got 1",
        ),
        (["encoder.local_reach=0"], "encoder: local_reach must be at least 1"),
        (["curriculum.lessons=true"], "lessons must be false for the task 'memorize', got true"),
        (["encoder.architecture=bert", "encoder.pooling=mean"], "pooling must be 'cls' for bert"),
        (["encoder.init_std=0"], "encoder: init_std must be above 0 and below 1, got 0"),
        (["encoder.dropout=1"], "dropout must be at least 0 and below 1"),
        (
            ["pretrained_dropout=0"],
            "must be null without a pretrained encoder, got 0.*encoder.drop",
        ),
        (
            ["encoder=null", "pretrained=folder", "pretrained_dropout=1"],
            "pretrained_dropout must be at least 0 and below 1, got 1",
        ),
        (["encoder.vocab_size=10"], "vocab_size must be at least 257"),
        (["memory.bptt_depth=0"], "memory: bptt_depth must be at least 1"),
        (
            ["memory.bptt_depth=4"],
            r"memory\.bptt_depth must be at most the 3 segments of the longest documents .* got 4",
        ),
        (
            ["memory.bptt_depth=6", "curriculum.continue_segments=5"],
            "must be at most the 5 segments of the longest documents",
        ),
        (
            [
                "memory.bptt_depth=4",
                "curriculum.continue_segments=5",
                "curriculum.continue_steps=0",
            ],
            "must be at most the 3 segments of the longest documents",
        ),
        (["memory.gate_bias_init=-1"], "gate_bias_init has no effect with update='replace'"),
        (["memory.gate_noise=0"], "gate_noise has no effect with update='replace', got 0"),
        (["memory.update=gated", "memory.gate_noise=-1"], "gate_noise must be at least 0, got -1"),
        (
            ["training.write_cost=0.1"],
            "write_cost must be 0 for memory.update='replace' with 3 memory tokens",
        ),
        (
            ["memory.update=gated", "memory.num_memory_tokens=0", "training.write_cost=0.1"],
            "write_cost must be 0 for memory.update='gated' with 0 memory tokens, got 0.1",
        ),
        (["training.write_cost=-1"], "training: write_cost must be at least 0"),
        (["task.num_facts=2"], "task: num_facts must be 1 for name='memorize'"),
        (["task.background=null"], "background and validation_background must be given together"),
        (["training.keep_checkpoints=1"], "training: keep_checkpoints must be at least 2"),
        (["training.average_decay=1"], "average_decay must be at least 0 and below 1, got 1"),
        (["training.length_decay=-1"], "length_decay must be at least 0"),
        (["training.seed=-1"], "training: seed must be at least 0"),
        (["training.seed=4294967296"], "training: seed must be at most 4294967295, got 42949672"),
        (["evaluation.segments=[]"], "segments must name at least one length"),
        (["evaluation.segments=[0]"], "evaluation: segments must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(task_run(), settings)


@pytest.mark.parametrize(
    "setting",
    [
        "training.weight_decay=nan",
        "training.learning_rate=inf",
        "training.length_decay=nan",
        "training.length_decay=inf",
        "training.write_cost=nan",
        "training.write_cost=inf",
        "training.max_gradient_norm=nan",
        "training.average_decay=nan",
        "training.betas=[0.9, NaN]",
        "memory.noise=nan",
        "memory.noise=inf",
        "memory.gate_noise=nan",
        "memory.gate_bias_init=nan",
        "memory.gate_bias_init=-inf",
        "encoder.init_std=nan",
        "encoder.dropout=nan",
        "task.fragments=nan",
        "curriculum.advance_accuracy=nan",
    ],
)
def test_numbers_that_are_none_are_refused_with_their_name(setting):
    name, _, value = setting.partition("=")
    *_, part, field = ["", *name.split(".")]
    with pytest.raises(ValueError, match=rf"{part}(\.|: ){field} must be .*, got") as met:
        apply_overrides(task_run(memory={"update": "gated"}), [setting])
    assert value.strip("-[]0.9, ").lower() in str(met.value)


def test_gradients_of_any_length_and_the_largest_seed_are_taken():
    run = apply_overrides(
        task_run(), ["training.max_gradient_norm=inf", f"training.seed={2**32 - 1}"]
    )
    assert run.training.resolve(run.curriculum).max_gradient_norm == math.inf
