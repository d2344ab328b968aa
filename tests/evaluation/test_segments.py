"""Accuracy by number of segments: streamed documents, intervals, tables and figures."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from byheart.adapters.recurrent import RecurrentMemory
from byheart.data.tasks import Task, TaskConfig, TaskSample, collate, train_task_tokenizer
from byheart.evaluation import segments
from byheart.evaluation.peak_memory import peak_memory
from byheart.evaluation.segments import count_right, evaluate_by_segments
from byheart.evaluation.segments_plot import plot_accuracy_by_segments
from byheart.evaluation.segments_result import RunsResult, SegmentsMeasurement, SegmentsResult
from byheart.memory.recurrent import RecurrentState
from byheart.models.recurrent_config import RecurrentMemoryConfig

LENGTH = 23


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories.txt"
    path.write_text("The boat waited near a bridge. Nobody came, and the river was quiet. " * 30)
    return path


@pytest.fixture(scope="module")
def make_task(stories):
    tokenizer = train_task_tokenizer(
        TaskConfig(name="memorize", segment_length=LENGTH, background=str(stories)), 900
    )

    def make(**changes) -> Task:
        settings = {"name": "detect", "segment_length": LENGTH, "background": str(stories)}
        return Task(TaskConfig(**(settings | changes)), tokenizer, split="validation")

    return make


def make_model(task: Task, **changes) -> RecurrentMemory:
    torch.manual_seed(3)
    size = task.tokenizer.vocab_size
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=size + 3, pad_token_id=size + 2, hidden_size=14, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=11, max_position_embeddings=32, num_labels=6,
        )
    )  # fmt: skip
    settings = {
        "segment_length": LENGTH, "num_memory_tokens": 5, "start_ids": (size,),
        "separator_ids": (size + 1,), "end_ids": (size + 1,),
    }  # fmt: skip
    model = RecurrentMemory(bert, RecurrentMemoryConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # answers that depend on what is read
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model


@pytest.mark.parametrize("segments_per_call", [1, 2, 8])
@pytest.mark.parametrize(
    ("form", "alignment"),
    [("clean", "left"), ("clean", "right"), ("report", "right"), ("clean", "center")],
)
def test_streamed_documents_are_answered_like_whole_ones(
    make_task, form, alignment, segments_per_call
):
    task = make_task(form=form)
    model = make_model(task, alignment=alignment)
    samples = [task.sample(index, 5) for index in range(30)]
    # rows of 7: the report's padding depends on the batch
    whole = 0
    for start in range(0, 30, 7):
        batch = collate(samples[start : start + 7])
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        whole += int((logits.argmax(dim=-1) == batch["labels"]).sum())
    assert 0 < whole < 30
    right = count_right(model, task, 5, range(30), rows=7, segments_per_call=segments_per_call)
    assert right == whole


def test_no_more_than_a_few_segments_are_asked_for_at_once(make_task, monkeypatch):
    task, asked = make_task(), []
    tokens = TaskSample.tokens

    def record(sample: TaskSample, start: int, stop: int):
        asked.append(stop - start)
        return tokens(sample, start, stop)

    monkeypatch.setattr(TaskSample, "tokens", record)
    result = evaluate_by_segments(
        make_model(task), task, segments=(64,), samples=2, segments_per_call=4
    )
    assert set(asked) == {4 * LENGTH}
    assert result.measurements[0].num_tokens == sum(asked) == 2 * 64 * LENGTH


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_have_the_precision_asked_for_and_memory_has_its_own(make_task, precision):
    task, products = make_task(), set()
    model = make_model(task)
    linear = next(part for part in model.modules() if isinstance(part, torch.nn.Linear))
    linear.register_forward_hook(lambda _, __, output: products.add(output.dtype))
    commit, memories = RecurrentState.commit, set()

    def committed(state, new):
        memories.add(new.memory.dtype)
        return commit(state, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurrentState, "commit", committed)
        count_right(model, task, 3, range(2), precision=precision)
    assert products == {getattr(torch, precision)}
    assert memories == {torch.float32}


def test_measuring_leaves_the_model_in_its_mode_without_gradients(make_task):
    task = make_task()
    model = make_model(task).train()
    before = torch.get_rng_state()
    count_right(model, task, 2, range(3))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_length_is_measured_and_progress_ends_at_the_total(make_task):
    task, seen = make_task(), []
    result = evaluate_by_segments(
        make_model(task), task, segments=(3, 1), samples=5, rows=2, on_progress=seen.append
    )
    assert [m.num_segments for m in result.measurements] == [3, 1]
    assert [m.num_samples for m in result.measurements] == [5, 5]
    assert seen[-1].num_tokens == seen[-1].total_tokens == 5 * 4 * LENGTH
    assert all(m.seconds > 0 for m in result.measurements)
    assert (result.task, result.form, result.num_labels) == ("detect", "clean", 6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_peak_memory_is_that_of_the_work_inside_and_of_nothing_before():
    def use(megabytes: int) -> int:
        with peak_memory(torch.device("cpu")) as peak:
            torch.ones(megabytes << 18)
        return peak.num_bytes

    small, large, again = use(1), use(300), use(1)
    assert large - small > 250 << 20
    assert again - small < 50 << 20


def measured(num_segments=1, num_right=9, num_samples=10, seconds=2.0, peak=3 << 20):
    return SegmentsMeasurement(
        num_segments=num_segments, num_samples=num_samples, num_right=num_right,
        num_tokens=num_segments * num_samples * 7, seconds=seconds, peak_memory_bytes=peak,
    )  # fmt: skip


def result_of(*measurements, task="memorize"):
    return SegmentsResult(
        task=task, form="clean", segment_length=7, num_labels=6, measurements=measurements
    )


def test_wilson_interval_of_a_worked_example():
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I
    assert measured(num_right=81, num_samples=263).interval == pytest.approx(
        (0.2553, 0.3662), abs=5e-5
    )
    assert measured(num_right=0, num_samples=20).interval == pytest.approx((0, 0.1611), abs=5e-5)
    assert measured(num_right=29, num_samples=29).interval == pytest.approx((0.8830, 1), abs=5e-5)


def test_a_result_survives_json():
    result = result_of(measured(), measured(4, peak=None))
    content = json.loads(json.dumps(result.to_dict()))
    assert content["measurements"][0]["accuracy"] == 0.9
    assert content["measurements"][1]["tokens_per_second"] == 140.0
    assert SegmentsResult.from_dict(content) == result


def test_the_precision_of_a_joined_result_is_that_of_all_its_parts():
    first, second = (replace(result_of(measured(n)), precision="float32") for n in (1, 4))
    joined = SegmentsResult.joined([first, second])
    assert joined.precision == "float32"
    assert [m.num_segments for m in joined.measurements] == [1, 4]
    other = replace(second, precision="bfloat16")
    assert SegmentsResult.joined([first, other]).precision is None


def test_table_of_one_result():
    lines = result_of(measured(), measured(4096, peak=None)).to_markdown().splitlines()
    assert "memorize (clean form)" in lines[0]
    assert "chance 16.7%" in lines[0]
    assert lines[4] == "| 1 | 7 | 90.00% | 59.6% to 98.2% | 35 | 3.0 |"
    assert lines[5] == "| 4,096 | 28,672 | 90.00% | 59.6% to 98.2% | 143,360 | - |"


def test_mean_and_deviation_of_runs_by_hand():
    runs = RunsResult(
        runs=tuple(result_of(measured(num_right=right), measured(4)) for right in (8, 9, 10))
    )
    assert runs.mean == pytest.approx((0.9, 0.9))
    assert runs.deviation == pytest.approx((0.1, 0.0))
    row = runs.to_markdown({1: 0.5}).splitlines()[4]
    assert row == "| 1 | 7 | 90.00% | 10.00% | 80.00% | 35 | 3.0 | 50.00% |"
    assert runs.to_markdown({1: 0.5}).splitlines()[5].endswith("| - |")
    assert RunsResult(runs=runs.runs[:1]).deviation is None


def test_runs_of_different_tasks_or_lengths_are_not_mixed():
    with pytest.raises(ValueError, match="results of the same task at the same lengths"):
        RunsResult(runs=(result_of(measured()), result_of(measured(), task="detect")))
    with pytest.raises(ValueError, match="results of the same task at the same lengths"):
        RunsResult(runs=(result_of(measured(1)), result_of(measured(2))))
    with pytest.raises(ValueError, match="one or more results"):
        RunsResult(runs=())


def test_figure_of_several_runs_and_published_numbers(tmp_path):
    runs = RunsResult(
        runs=tuple(
            result_of(*(measured(2**power, right - power // 2) for power in range(13)))
            for right in (10, 9)
        )
    )
    lines = {"memorize": runs, "another": RunsResult(runs=runs.runs[:1])}
    path = plot_accuracy_by_segments(
        lines, tmp_path / "accuracy.png", references={"report": {2: 1.0, 4096: 0.9}}
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lines must hold at least one entry"):
        plot_accuracy_by_segments({}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": ()}, "segments must be one or more numbers of at least 1, got"),
        ({"segments": (1, 0)}, "segments must be one or more numbers of at least 1, got"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"segments_per_call": 0}, "segments_per_call must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_task, settings, message):
    task = make_task()
    with pytest.raises(ValueError, match=message):
        evaluate_by_segments(make_model(task), task, **settings)


def test_lengths_that_cannot_hold_all_facts_are_refused_before_longer_ones_are_read(
    make_task, monkeypatch
):
    task = make_task(name="capacity", num_facts=5)
    assert 1 < task.min_segments < 16
    monkeypatch.setattr(segments, "count_right", pytest.fail)
    with pytest.raises(ValueError, match=f"at least the {task.min_segments} that hold all facts"):
        evaluate_by_segments(make_model(task), task, segments=(16, 1))
    read = []
    monkeypatch.setattr(segments, "count_right", lambda *inputs, **_: read.append(inputs[2]) or 0)
    result = evaluate_by_segments(make_model(task), task, samples=1)
    assert read == [m.num_segments for m in result.measurements]
    assert read == [n for n in segments.SEGMENTS if n >= task.min_segments]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_refused(make_task, value):
    task = make_task()
    model = make_model(task)
    with torch.no_grad():
        model.model.classifier.bias[2] = value
    with pytest.raises(
        ValueError, match=r"must be finite, got \[.*\] for document 4 of 2 segments"
    ):
        count_right(model, task, 2, [4, 5])


def test_model_and_task_must_agree_on_a_segment(make_task):
    task = make_task()
    model = make_model(task, segment_length=20)
    with pytest.raises(ValueError, match="same length, got 20 and 23"):
        evaluate_by_segments(model, task, segments=(1,))
