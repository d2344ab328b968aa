import pytest
from hypothesis import given
from hypothesis import strategies as st

from byheart.ops.segments import segment_bounds

ALIGNMENTS = ("left", "right", "center")
documents = given(
    num_tokens=st.integers(0, 300),
    segment_length=st.integers(1, 60),
    alignment=st.sampled_from(ALIGNMENTS),
)


def lengths(num_tokens, segment_length, alignment):
    return [stop - start for start, stop in segment_bounds(num_tokens, segment_length, alignment)]


@documents
def test_segments_hold_every_token_once_and_in_order(num_tokens, segment_length, alignment):
    bounds = segment_bounds(num_tokens, segment_length, alignment)
    tokens = [token for start, stop in bounds for token in range(start, stop)]
    assert tokens == list(range(num_tokens))


@documents
def test_segments_are_full_or_shorter_but_never_empty(num_tokens, segment_length, alignment):
    assert all(
        1 <= length <= segment_length for length in lengths(num_tokens, segment_length, alignment)
    )


@documents
def test_there_are_as_few_segments_as_can_be(num_tokens, segment_length, alignment):
    fewest = (num_tokens + segment_length - 1) // segment_length
    assert len(lengths(num_tokens, segment_length, alignment)) == fewest


@documents
def test_alignment_says_which_segment_is_short(num_tokens, segment_length, alignment):
    cut = lengths(num_tokens, segment_length, alignment)
    if alignment == "left":
        assert set(cut[:-1]) <= {segment_length}
    elif alignment == "right":
        assert set(cut[1:]) <= {segment_length}
    else:
        assert len(set(cut[:-1])) <= 1
        assert cut == sorted(cut, reverse=True)


@given(num_tokens=st.integers(0, 300), more=st.integers(0, 100), segment_length=st.integers(1, 60))
def test_what_follows_moves_no_full_segment_on_the_left(num_tokens, more, segment_length):
    before = segment_bounds(num_tokens, segment_length, "left")
    after = segment_bounds(num_tokens + more, segment_length, "left")
    full = num_tokens // segment_length
    assert after[:full] == before[:full]


def test_the_reports_first_segment_is_the_short_one():
    # 3 windows of 512 with 10 memory and 3 special tokens; 2 special tokens fall out of the text
    assert segment_bounds(3 * 499 - 2, 499, "right") == [(0, 497), (497, 996), (996, 1495)]


@pytest.mark.parametrize(
    ("alignment", "expected"),
    [
        ("left", [(0, 4), (4, 8), (8, 10)]),
        ("right", [(0, 2), (2, 6), (6, 10)]),
        ("center", [(0, 4), (4, 8), (8, 10)]),
    ],
)
def test_ten_tokens_in_segments_of_four(alignment, expected):
    assert segment_bounds(10, 4, alignment) == expected


def test_center_spreads_what_is_missing():
    assert lengths(21, 10, "center") == [7, 7, 7]
    assert lengths(21, 10, "left") == [10, 10, 1]


@pytest.mark.parametrize(("num_tokens", "segment_length"), [(-1, 4), (4, 0)])
def test_numbers_out_of_range_are_refused(num_tokens, segment_length):
    with pytest.raises(ValueError, match=rf"got {num_tokens} and {segment_length}\."):
        segment_bounds(num_tokens, segment_length)
