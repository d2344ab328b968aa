"""Matrices of segments trained on and evaluated on: values, table, figure."""

import json

import pytest

from byheart.evaluation.generalization import GeneralizationResult
from byheart.evaluation.segments_plot import plot_accuracy_by_segments
from byheart.evaluation.segments_result import RunsResult, SegmentsMeasurement, SegmentsResult


def runs_of(*runs, lengths=(1, 2, 15), task="detect"):
    """One run per tuple, with the right answers of 10 to each length."""
    return RunsResult(
        runs=tuple(
            SegmentsResult(
                task=task, form="clean", segment_length=7, num_labels=6,
                measurements=tuple(
                    SegmentsMeasurement(
                        num_segments=length, num_samples=10, num_right=right,
                        num_tokens=length * 70, seconds=2.0, peak_memory_bytes=None,
                    )
                    for length, right in zip(lengths, rights, strict=True)
                ),
            )
            for rights in runs
        )
    )  # fmt: skip


def test_the_matrix_has_a_row_per_stage_with_the_report_below():
    result = GeneralizationResult(stages={1: runs_of((10, 2, 1)), 8: runs_of((10, 10, 9))})
    lines = result.to_markdown({1: {1: 1.0, 2: 0.166}, 2: {1: 1.0}}).splitlines()
    assert "Accuracy of detect (clean form)" in lines[0]
    assert "10 documents each, chance 16.7%**" in lines[0]
    assert lines[2] == "| trained on | accuracy (%) of | 1 | 2 | 15 |"
    assert lines[4:] == [
        "| 1 | 1 run | 100.0 | 20.0 | 10.0 |",
        "|  | report | 100.0 | 16.6 | - |",
        # the report has no such stage
        "| 8 | 1 run | 100.0 | 100.0 | 90.0 |",
    ]


def test_several_runs_are_shown_with_their_deviation_and_counted_by_stage():
    # the second stage was reached by one of the two runs
    stages = {1: runs_of((10, 2, 1), (10, 4, 1)), 2: runs_of((10, 10, 9))}
    lines = GeneralizationResult(stages=stages).to_markdown().splitlines()
    assert lines[0].endswith("; mean ± standard deviation**")
    assert lines[4:] == [
        "| 1 | 2 runs | 100.0 ±0.0 | 30.0 ±14.1 | 10.0 ±0.0 |",
        "| 2 | 1 run | 100.0 | 100.0 | 90.0 |",
    ]


def test_json_holds_every_stage_with_every_run():
    stages = {1: runs_of((10, 2, 1), (10, 4, 1)), 2: runs_of((10, 10, 9))}
    content = json.loads(json.dumps(GeneralizationResult(stages=stages).to_dict()))
    assert content["segments"] == [1, 2, 15]
    assert [stage["trained_on"] for stage in content["stages"]] == [1, 2]
    assert content["stages"][0]["accuracy_mean"] == pytest.approx([1, 0.3, 0.1])
    assert [len(stage["runs"]) for stage in content["stages"]] == [2, 1]


@pytest.mark.parametrize(
    "stages",
    [
        {},
        {1: runs_of((1, 2, 3)), 2: runs_of((1, 2), lengths=(1, 2))},
        {1: runs_of((1, 2, 3)), 2: runs_of((1, 2, 3), task="reason")},
    ],
)
def test_stages_that_cannot_be_compared_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be one or more of the same task"):
        GeneralizationResult(stages=stages)


def test_the_figure_may_have_lengths_as_they_are(tmp_path):
    lengths = tuple(range(1, 16))
    lines = {
        f"trained on {stage}": runs_of([min(10, stage + 2)] * 15, lengths=lengths)
        for stage in range(1, 8)
    }
    references = {f"report, {stage}": dict.fromkeys(lengths, stage / 8) for stage in range(1, 8)}
    path = plot_accuracy_by_segments(
        lines, tmp_path / "figure.png", references=references, scale="linear"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
