import dataclasses

import pytest
import torch

from byheart.errors import MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.dense import DenseStore
from byheart.memory.state import MemoryState
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder


@pytest.fixture
def decoder():
    return tiny_decoder()


def test_commit_counts_what_was_read(decoder):
    state = read_tokens(decoder, random_tokens(3, 17), decoder.new_state(3)).state
    assert state.position.tolist() == [17, 17, 17]
    assert state.num_pending.tolist() == [3, 3, 3]
    assert state.num_cached.tolist() == [7, 7, 7]
    assert state.stores[1].num_written.tolist() == [14, 14, 14]
    assert state.memory_size == 41


def test_a_state_prints_as_what_it_has_read(decoder):
    state = read_tokens(decoder, random_tokens(3, 17), decoder.new_state(3)).state
    assert repr(state) == (
        "MemoryState(position=[17, 17, 17]; num_pending=[3, 3, 3]; num_cached=[7, 7, 7]; "
        "layer 1: memory_size=41, num_written=[14, 14, 14]; cpu)"
    )
    assert "position=[0, 0, 0, 0, 0, 0, 0, 0, ...];" in repr(decoder.new_state(9))


def test_xl_cache_holds_the_last_tokens_before_the_segment(decoder):
    tokens = random_tokens(1, 7)
    out = decoder(tokens, state=(state := decoder.new_state(1)))
    state = state.commit(out.new_entries)
    for cached, new in zip(state.xl_cache, out.new_entries.layers, strict=True):
        assert torch.equal(cached.keys, new.keys)
        assert torch.equal(cached.values, new.values)


def test_memory_holds_the_segment_in_order(decoder):
    state = decoder.new_state(2)
    keys = []
    for start in range(0, 49, 7):
        out = decoder(random_tokens(2, 49)[:, start : start + 7], state=state)
        keys.append(out.new_entries.layers[1].keys)
        state = state.commit(out.new_entries)
    store = state.stores[1]
    written = torch.cat(keys, dim=2)
    numbers = store.entry_numbers()
    for row in range(2):
        for slot in range(41):
            assert torch.equal(store.keys[row, :, slot], written[row, :, numbers[row, slot]])
    assert sorted(numbers[0].tolist()) == list(range(49 - 41, 49))


def test_entries_that_say_another_number_of_tokens_are_refused(decoder):
    state = decoder.new_state(2)
    new = decoder(random_tokens(2, 7), state=state).new_entries
    for counts in ([7, 3], [7, 8], [7, -1]):
        changed = dataclasses.replace(new, num_tokens=torch.tensor(counts))
        with pytest.raises(MemoryStateError, match="must have between 7 and 7 tokens per row"):
            state.commit(changed)
    assert state.commit(new).position.tolist() == [7, 7]


def test_a_committed_state_is_used_up(decoder):
    tokens = random_tokens(2, 7)
    old = decoder.new_state(2)
    out = decoder(tokens, state=old)
    new = old.commit(out.new_entries)
    for use in (
        lambda: decoder(tokens, state=old),
        lambda: old.commit(out.new_entries),
        old.fork,
        lambda: old.to("cpu"),
    ):
        with pytest.raises(MemoryStateError, match=r"fork\(\) before commit"):
            use()
    decoder(tokens, state=new)


def test_the_same_entries_can_be_committed_to_two_forks(decoder):
    tokens = random_tokens(2, 19)
    one = read_tokens(decoder, tokens[:, :7], decoder.new_state(2)).state
    other = one.fork()
    entries = decoder(tokens[:, 7:10], state=one).new_entries
    one, other = one.commit(entries), other.commit(entries)
    first = read_tokens(decoder, tokens[:, 10:], one, return_logits=True).logits
    second = read_tokens(decoder, tokens[:, 10:], other, return_logits=True).logits
    assert torch.equal(first, second)


def test_starting_a_document_leaves_the_state_usable(decoder):
    tokens = random_tokens(2, 14)
    state = read_tokens(decoder, tokens[:, :10], decoder.new_state(2)).state
    started = state.start_documents(torch.tensor([True, False]))
    assert started.position.tolist() == [0, 10]
    assert state.position.tolist() == [10, 10]
    decoder(tokens[:, 10:14], state=state)


def test_selected_rows_are_copies(decoder):
    tokens = random_tokens(2, 24)
    state = read_tokens(decoder, tokens[:, :17], decoder.new_state(2)).state
    beams = state.select_rows(torch.tensor([1, 1, 0]))
    picked = read_tokens(decoder, tokens[[1, 1, 0], 17:], beams, return_logits=True).logits
    whole = read_tokens(decoder, tokens[:, 17:], state, return_logits=True).logits
    torch.testing.assert_close(picked, whole[[1, 1, 0]])


def test_a_pass_must_not_cross_the_end_of_a_segment(decoder):
    state = read_tokens(decoder, random_tokens(3, 5), decoder.new_state(3)).state
    with pytest.raises(ValueError, match=r"row 0 has room for 2, got 3\. Use byheart\.read_tokens"):
        decoder(random_tokens(3, 3), state=state)


def test_states_of_other_models_are_refused(decoder):
    other = tiny_decoder(tiny_config(xl_cache_length=5)).new_state(2)
    with pytest.raises(MemoryStateError, match=r"xl_cache_length 5 \(not 7\)"):
        decoder(random_tokens(2, 3), state=other)
    plain = tiny_decoder(tiny_config(memory_size=0))
    with pytest.raises(MemoryStateError, match=r"knn_memory\.layers \(1,\) \(not \(\)\)"):
        plain(random_tokens(2, 3), state=decoder.new_state(2))
    with pytest.raises(ValueError, match="must have the batch's 3 rows, got 2"):
        decoder(random_tokens(3, 3), state=decoder.new_state(2))


def test_sizes_out_of_range_are_refused(decoder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        decoder.new_state(0)
    with pytest.raises(ValueError, match=r"memory_size must be 0 \(no memory\) or more, got -3"):
        decoder.new_state(1, memory_size=-3)
    plain = tiny_decoder(tiny_config(memory_size=0))
    with pytest.raises(ValueError, match="has no kNN memory, got memory_size=5"):
        plain.new_state(1, memory_size=5)


def test_commit_refuses_entries_of_another_batch_or_model(decoder):
    entries = decoder(random_tokens(3, 3)).new_entries
    with pytest.raises(
        MemoryStateError, match=r"\(2, 3, 3, 8\), got 2 layers with \[\(3, 3, 3, 8\)\]"
    ):
        decoder.new_state(2).commit(entries)
    deeper = tiny_decoder(tiny_config(num_layers=3)).new_state(3)
    with pytest.raises(MemoryStateError, match="must be of 3 layers"):
        deeper.commit(entries)


def test_a_pass_is_committed_once_and_a_refusal_changes_nothing(decoder):
    tokens = random_tokens(2, 9)
    state = decoder.new_state(2)
    first = decoder(tokens[:, :3], state=state).new_entries
    state = state.commit(first)
    with pytest.raises(MemoryStateError, match=r"have read \[3, 3\] tokens, got .* \[0, 0\]"):
        state.commit(first)
    second = decoder(tokens[:, 3:6], state=state).new_entries
    whole = decoder(tokens[:, :7], state=decoder.new_state(2)).new_entries
    too_long = dataclasses.replace(whole, position=state.position)
    with pytest.raises(MemoryStateError, match=r"inside a segment of 7 tokens, got .* \[10, 10\]"):
        state.commit(too_long)
    assert state.commit(second).position.tolist() == [6, 6]


def test_padding_wider_than_a_segment_changes_nothing(decoder):
    tokens, num_tokens = random_tokens(2, 10), torch.tensor([5, 7])
    states = []
    for width in (7, 10):
        out = decoder(tokens[:, :width], state=(s := decoder.new_state(2)), num_tokens=num_tokens)
        states.append(s.commit(out.new_entries))
    rest = random_tokens(2, 30, seed=4)
    narrow, wide = (read_tokens(decoder, rest, s, return_logits=True).logits for s in states)
    torch.testing.assert_close(narrow, wide)


@pytest.mark.parametrize("wrong", [[4, 3], [-1, 3]])
def test_counts_that_the_columns_do_not_have_are_refused(decoder, wrong):
    match = f"between 0 and the 3 columns of input_ids, got {wrong[0]} for row 0"
    for read in (
        lambda: decoder(random_tokens(2, 3), num_tokens=torch.tensor(wrong)),
        lambda: read_tokens(
            decoder, random_tokens(2, 3), decoder.new_state(2), num_tokens=torch.tensor(wrong)
        ),
    ):
        with pytest.raises(ValueError, match=match):
            read()


def test_a_store_of_your_own_is_used(decoder):
    made = []

    def make(*shape):
        made.append(shape)
        return DenseStore.empty(*shape)

    state = decoder.new_state(2, make_store=make)
    assert made == [(2, 3, 41, 8)]
    read_tokens(decoder, random_tokens(2, 21), state)


def test_the_memory_can_be_larger_or_smaller_than_configured(decoder):
    for size in (0, 3, 97):
        state = read_tokens(
            decoder, random_tokens(2, 21), decoder.new_state(2, memory_size=size)
        ).state
        assert state.memory_size == size


def test_evicted_tokens_enter_memory_when_they_leave_the_cache():
    memory = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, write="evicted")
    decoder = tiny_decoder(tiny_config(memory=memory, xl_cache_length=9))
    state = read_tokens(decoder, random_tokens(2, 21), decoder.new_state(2)).state
    assert state.stores[1].num_written.tolist() == [21 - 9] * 2
    assert isinstance(state, MemoryState)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("length", [3, 7])
def test_entries_of_different_widths_leave_the_state(decoder, side, length):
    state = decoder.new_state(2)
    new = decoder(random_tokens(2, length), state=state).new_entries
    keys, values = new.layers[1]
    narrow = (keys[:, :, :2], values) if side == 0 else (keys, values[:, :, :2])
    layers = (new.layers[0], type(new.layers[1])(*narrow))
    with pytest.raises(MemoryStateError, match=r"\(2, 3, \d, 8\), got 2 layers with .*3, 2, 8\)"):
        state.commit(dataclasses.replace(new, layers=layers))
    assert state.commit(new).position.tolist() == [length, length]


def test_a_memory_smaller_than_its_buckets_is_refused(decoder):
    memory = KnnMemoryConfig(
        layers=(1,), memory_size=40, top_k=5, search="strided_bucket", num_buckets=10
    )
    other = tiny_decoder(tiny_config(memory=memory))
    with pytest.raises(
        ValueError, match=r"memory_size must be 0 or at least the 10 buckets.*got 9"
    ):
        other.new_state(2, memory_size=9)
    for size in (0, 10, 11):
        read_tokens(other, random_tokens(2, 24), other.new_state(2, memory_size=size))
