import dataclasses
import json

import pytest
import torch

from byheart.errors import CheckpointError, MemoryStateError
from byheart.memory.recurrent import NewMemory, RecurrentLayout, RecurrentState

LAYOUT = RecurrentLayout(num_memory_tokens=2, embed_dim=5, segment_length=7)
TENSORS = ("memory", "num_segments", "pending", "num_pending", "position")


def new_memory(before, tokens, *, document_start=None):
    """Make up what a pass over so many tokens per row would return."""
    if document_start is None:
        document_start = torch.zeros(before.batch_size, dtype=torch.bool)
    start = before.start_documents(document_start)
    total = start.num_pending + torch.tensor(tokens)
    return NewMemory(
        memory=torch.randn(before.memory.shape),
        num_segments=start.num_segments + total // 7,
        pending=torch.randint(0, 9, before.pending.shape),
        num_pending=total % 7,
        position=start.position + torch.tensor(tokens),
        position_before=start.position,
        document_start=document_start,
    )


@pytest.fixture
def state():
    empty = RecurrentState.empty(LAYOUT, 3)
    return empty.commit(new_memory(empty, [9, 3, 14]))


def assert_equal_states(mine, theirs):
    assert mine.layout == theirs.layout
    for name in TENSORS:
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_an_empty_state_has_read_nothing():
    state = RecurrentState.empty(LAYOUT, 3)
    assert state.batch_size == 3
    assert state.memory.shape == (3, 2, 5)
    assert state.memory.dtype == torch.float32
    for name in ("num_segments", "num_pending", "position"):
        assert getattr(state, name).tolist() == [0, 0, 0]


def test_a_state_prints_as_what_it_has_read():
    layout = RecurrentLayout(num_memory_tokens=2, embed_dim=3, segment_length=4)
    assert repr(RecurrentState.empty(layout, 2)) == (
        "RecurrentState(position=[0, 0]; num_segments=[0, 0]; num_pending=[0, 0]; cpu)"
    )


def test_commit_takes_over_the_pass(state):
    new = new_memory(state, [5, 0, 1])
    after = state.commit(new)
    assert after.position.tolist() == [14, 3, 15]
    assert after.num_segments.tolist() == [2, 0, 2]
    assert after.num_pending.tolist() == [0, 3, 1]
    assert torch.equal(after.memory, new.memory)


def test_commit_leaves_the_state_as_it_was(state):
    copy = state.fork()
    state.commit(new_memory(state, [5, 0, 1]))
    assert_equal_states(state, copy)


def test_a_row_that_starts_a_document_has_read_nothing(state):
    started = state.start_documents(torch.tensor([True, False, False]))
    assert started.position.tolist() == [0, 3, 14]
    assert started.num_segments.tolist() == [0, 0, 2]
    assert started.num_pending.tolist() == [0, 3, 0]
    assert state.position.tolist() == [9, 3, 14]


def test_a_pass_that_starts_documents_is_committed_to_the_state_before(state):
    starts = torch.tensor([False, True, False])
    after = state.commit(new_memory(state, [1, 4, 2], document_start=starts))
    assert after.position.tolist() == [10, 4, 16]


def test_a_pass_is_committed_once(state):
    new = new_memory(state, [5, 0, 1])
    after = state.commit(new)
    with pytest.raises(
        MemoryStateError, match=r"\[14, 3, 15\].*\[9, 3, 14\].*Commit each pass once"
    ):
        after.commit(new)


@pytest.mark.parametrize(
    "other",
    [
        RecurrentState.empty(LAYOUT, 2),
        RecurrentState.empty(LAYOUT, 1),
        RecurrentState.empty(dataclasses.replace(LAYOUT, embed_dim=6), 3),
        RecurrentState.empty(dataclasses.replace(LAYOUT, num_memory_tokens=1), 3),
        RecurrentState.empty(dataclasses.replace(LAYOUT, segment_length=8), 3),
    ],
    ids=["2 rows", "1 row", "width", "memory tokens", "segment length"],
)
def test_a_pass_over_another_state_is_refused(other):
    new = new_memory(other, [1] * other.batch_size)
    with pytest.raises(MemoryStateError, match="A new memory must continue rows of"):
        RecurrentState.empty(LAYOUT, 3).commit(new)


def test_a_fork_shares_nothing(state):
    fork = state.fork()
    assert_equal_states(fork, state)
    for name in TENSORS:
        assert getattr(fork, name).data_ptr() != getattr(state, name).data_ptr()


def test_picked_rows_come_in_the_order_they_are_named(state):
    picked = state.select_rows(torch.tensor([2, 0, 2, 2]))
    assert picked.position.tolist() == [14, 9, 14, 14]
    for name in TENSORS:
        for mine, row in zip(getattr(picked, name), (2, 0, 2, 2), strict=True):
            assert torch.equal(mine, getattr(state, name)[row])
    picked.memory.zero_()
    assert state.memory[2].any()


def test_moving_keeps_every_number(state):
    assert_equal_states(state.to("cpu"), state)
    assert state.to("meta").memory.device.type == "meta"


def test_a_saved_state_is_the_same_state(state, tmp_path):
    state.save(tmp_path / "state", fingerprint="f")
    assert_equal_states(RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="f"), state)


def test_saving_again_replaces_what_was_there(state, tmp_path):
    state.save(tmp_path / "state", fingerprint="f")
    after = state.commit(new_memory(state, [5, 0, 1]))
    after.save(tmp_path / "state", fingerprint="g")
    assert_equal_states(RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="g"), after)


def test_picked_rows_save_only_themselves(state, tmp_path):
    picked = state.select_rows(torch.tensor([1]))
    picked.save(tmp_path / "state", fingerprint="f")
    loaded = RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="f")
    assert loaded.batch_size == 1
    assert_equal_states(loaded, picked)


def test_a_state_of_other_weights_is_refused(state, tmp_path):
    state.save(tmp_path / "state", fingerprint="a" * 20)
    with pytest.raises(MemoryStateError, match=r"fingerprint a{12}, this one has b{12}\."):
        RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="b" * 20)


def test_a_state_of_another_layout_is_refused(state, tmp_path):
    state.save(tmp_path / "state", fingerprint="f")
    other = RecurrentLayout(num_memory_tokens=4, embed_dim=5, segment_length=9)
    with pytest.raises(
        MemoryStateError, match=r"num_memory_tokens 2 \(not 4\), segment_length 7 \(not 9\)"
    ):
        RecurrentState.load(tmp_path / "state", other, fingerprint="f")


@pytest.mark.parametrize(("name", "value"), [("format", "byheart-memory"), ("format_version", 2)])
def test_another_format_is_refused(name, value, state, tmp_path):
    state.save(tmp_path / "state", fingerprint="f")
    manifest = tmp_path / "state" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert name in content
    manifest.write_text(json.dumps(content | {name: value}))
    with pytest.raises(CheckpointError, match="byheart-recurrent-state of version 1, found"):
        RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="f")


def test_a_missing_state_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="state"):
        RecurrentState.load(tmp_path / "state", LAYOUT, fingerprint="f")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_documents_start_in_rows_of_the_state(count, state):
    with pytest.raises(ValueError, match=rf"one boolean per row, \[3\], got \[{count}\]"):
        state.start_documents(torch.ones(count, dtype=torch.bool))


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0\."):
        RecurrentState.empty(LAYOUT, 0)
