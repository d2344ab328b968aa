import torch
from hypothesis import given
from hypothesis import strategies as st

from byheart.models.segmentation import Step, plan_steps
from byheart.ops.segments import segment_bounds

batches = given(
    num_tokens=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    segment_length=st.integers(1, 11),
    alignment=st.sampled_from(["left", "right", "center"]),
)


def spans_of(steps, row):
    return [
        span
        for step in steps
        for mine, span in zip(step.rows, step.spans, strict=True)
        if mine == row
    ]


@batches
def test_each_row_reads_its_own_segments_in_order(num_tokens, segment_length, alignment):
    steps = plan_steps(num_tokens, segment_length, alignment)
    for row, count in enumerate(num_tokens):
        assert spans_of(steps, row) == segment_bounds(count, segment_length, alignment)


@batches
def test_a_row_ends_once_at_its_last_segment(num_tokens, segment_length, alignment):
    steps = plan_steps(num_tokens, segment_length, alignment)
    ends = [
        (row, span[1])
        for step in steps
        for row, span, last in zip(step.rows, step.spans, step.last, strict=True)
        if last
    ]
    assert sorted(ends) == [(row, count) for row, count in enumerate(num_tokens) if count]


@batches
def test_rows_begin_together_or_end_together(num_tokens, segment_length, alignment):
    steps = plan_steps(num_tokens, segment_length, alignment)
    together = tuple(row for row, count in enumerate(num_tokens) if count)
    if together:
        assert steps[-1 if alignment == "right" else 0].rows == together
    else:
        assert steps == []


@batches
def test_a_step_takes_the_tokens_of_its_spans(num_tokens, segment_length, alignment):
    tokens = torch.arange(len(num_tokens) * 40).view(len(num_tokens), 40)
    for step in plan_steps(num_tokens, segment_length, alignment):
        cut, lengths = step.take(tokens)
        expected = [stop - start for start, stop in step.spans]
        assert cut.shape == (len(step.rows), max(expected))
        assert (lengths.tolist() if lengths is not None else [cut.shape[1]] * len(cut)) == expected
        for row, (start, stop), mine in zip(step.rows, step.spans, cut, strict=True):
            assert torch.equal(mine[: stop - start], tokens[row, start:stop])


def test_short_rows_join_late_on_the_right():
    steps = plan_steps([9, 3, 0, 5], 4, "right")
    assert [step.rows for step in steps] == [(0,), (0, 3), (0, 1, 3)]
    assert [step.spans for step in steps] == [
        ((0, 1),),
        ((1, 5), (0, 1)),
        ((5, 9), (0, 3), (1, 5)),
    ]
    assert [any(step.last) for step in steps] == [False, False, True]


def test_short_rows_end_early_on_the_left():
    steps = plan_steps([9, 3, 0, 5], 4, "left")
    assert [step.rows for step in steps] == [(0, 1, 3), (0, 3), (0,)]
    assert [step.last for step in steps] == [(False, True, False), (False, True), (True,)]


def test_a_step_of_all_rows_at_one_place_is_a_view():
    tokens = torch.arange(12).view(2, 6)
    cut, lengths = Step(rows=(0, 1), spans=((2, 5), (2, 5)), last=(False, False)).take(tokens)
    assert lengths is None
    assert cut.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
