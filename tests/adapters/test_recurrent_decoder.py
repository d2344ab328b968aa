"""Recurrent memory on byheart's own Decoder, alone and with its XL cache and kNN memory."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from recurrent_states import assert_same_inner, assert_same_state, read

from byheart.adapters.recurrent import RecurrentMemory
from byheart.errors import CheckpointError, MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.models.generate import SamplingConfig
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
TEXT, MEMORY = 7, 2
KINDS = {
    "alone": {"xl_cache_length": 0, "memory_size": 0},
    "XL cache": {"xl_cache_length": 11, "memory_size": 0},
    "kNN memory": {"xl_cache_length": 0},
    "both": {"xl_cache_length": 11},
    "evicted": {
        "xl_cache_length": 5,
        "memory": KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, write="evicted"),
    },
}
kinds = pytest.mark.parametrize("kind", KINDS)
streaming_kinds = pytest.mark.parametrize("kind", ["alone", "XL cache"])
knn_kinds = pytest.mark.parametrize("kind", ["kNN memory", "both", "evicted"])


def make(kind, *, tokens=MEMORY, **changes):
    decoder = tiny_decoder(tiny_config(**{"segment_length": TEXT + 2 * tokens, **KINDS[kind]}))
    torch.manual_seed(3)
    config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=tokens, **changes)
    return RecurrentMemory(decoder, config).eval()


@kinds
@torch.no_grad()
def test_without_memory_tokens_it_is_the_decoder(kind):
    memory_model, ids = make(kind, tokens=0), random_tokens(2, 31)
    decoder = memory_model.model
    base = read_tokens(decoder, ids, decoder.new_state(2), return_logits=True)
    logits, state = read(memory_model, ids)
    exact(logits, base.logits)
    if kind in ("alone", "XL cache"):
        exact(memory_model(ids).logits, base.logits)
    if state.inner is not None:
        whole = read_tokens(decoder, ids[:, :28], decoder.new_state(2)).state
        assert_same_inner(state.inner, whole)


@kinds
@torch.no_grad()
def test_a_window_is_a_segment_of_the_decoder(kind):
    memory_model, ids = make(kind), random_tokens(2, 28)
    decoder = memory_model.model
    first = memory_model.memory.memory.expand(2, -1, -1)
    logits, _ = read(memory_model, ids)
    state, memory = decoder.new_state(2), first
    for start in range(0, 28, TEXT):
        window = torch.cat([memory, decoder.embedding(ids[:, start : start + TEXT]), memory], dim=1)
        hidden, new = decoder.read_embeddings(window, state=state)
        state, memory = state.commit(new), hidden[:, -MEMORY:]
        expected = decoder.predict(hidden[:, MEMORY:-MEMORY], targets=None, logits=True)[1]
        exact(logits[:, start : start + TEXT], expected)


@streaming_kinds
def test_it_streams_in_any_pieces(kind):
    memory_model, ids = make(kind), random_tokens(2, 31)
    targets = random_tokens(2, 31, seed=2)
    with torch.no_grad():
        whole = memory_model(ids, targets=targets, logits_to_keep=31)
    end = memory_model.new_state(2).commit(whole.new_entries)

    @example_settings(max_examples=6)
    @given(cuts=st.lists(st.integers(1, 30), max_size=5, unique=True))
    def streamed_is_one_shot(cuts):
        state, logits, losses = memory_model.new_state(2), [], []
        edges = [0, *sorted(cuts), 31]
        for start, stop in itertools.pairwise(edges):
            with torch.no_grad():
                out = memory_model(
                    ids[:, start:stop],
                    targets=targets[:, start:stop],
                    logits_to_keep=stop - start,
                    state=state,
                )
            state = state.commit(out.new_entries)
            logits.append(out.logits)
            losses.append(out.token_losses)
        close(torch.cat(logits, dim=1), whole.logits)
        close(torch.cat(losses, dim=1), whole.token_losses)
        assert_same_state(state, end)

    streamed_is_one_shot()


@knn_kinds
@torch.no_grad()
def test_pieces_inside_of_a_segment_change_nothing(kind):
    memory_model, ids = make(kind), random_tokens(2, 28)
    logits, end = read(memory_model, ids)
    for cuts in ([3, 4], [1, 1, 5], [6, 1]):
        state, parts = memory_model.new_state(2), []
        for piece in ids.split(cuts * 4, dim=1):
            part, state = read(memory_model, piece, state)
            parts.append(part)
        close(torch.cat(parts, dim=1), logits)
        assert_same_state(state, end)


@knn_kinds
@torch.no_grad()
def test_the_knn_memory_is_frozen_in_a_call_and_committed_in_order(kind):
    memory_model, ids = make(kind), random_tokens(2, 42)
    _, before = read(memory_model, ids[:, :14])
    out = memory_model(ids[:, 14:], state=before)
    assert len(out.new_entries.inner_entries) == 4
    # what is read does not change the state: a second pass is the same
    assert torch.equal(memory_model(ids[:, 14:], state=before).logits, out.logits)
    by_hand, count = before.inner.fork(), before.inner.stores[1].num_written
    for entries in out.new_entries.inner_entries:
        by_hand = by_hand.commit(entries)
    after = before.commit(out.new_entries)
    assert_same_inner(after.inner, by_hand)
    assert (after.inner.stores[1].num_written > count).all()
    assert after.inner.position.tolist() == [6 * 11, 6 * 11]


@kinds
@torch.no_grad()
def test_a_ragged_batch_is_its_rows_alone(kind):
    side = "left" if kind in ("both", "alone") else "right"
    memory_model, lengths = make(kind), (23, 5, 14, 1, 22)
    rows = [random_tokens(1, length, seed=length) for length in lengths]
    past = random_tokens(len(rows), 14, seed=3)
    ids, mask = torch.zeros(5, 25).long(), torch.zeros(5, 25).long()
    for index, row in enumerate(rows):
        start = 0 if side == "right" else 25 - row.shape[1]
        place = slice(start, start + row.shape[1])
        ids[index, place], mask[index, place] = row, 1
    _, state = read(memory_model, past)
    out = memory_model(ids, attention_mask=mask, state=state, logits_to_keep=25)
    after = state.commit(out.new_entries)
    for index, row in enumerate(rows):
        _, mine = read(memory_model, past[[index]])
        alone = memory_model(row, state=mine)
        close(out.logits[index][mask[index].bool()], alone.logits[0])
        assert_same_state(after.select_rows(torch.tensor([index])), mine.commit(alone.new_entries))


@kinds
@torch.no_grad()
def test_a_row_of_padding_keeps_its_memory(kind):
    memory_model = make(kind)
    _, state = read(memory_model, random_tokens(3, 17))
    row, fork = torch.tensor([1]), state.fork()
    mask = torch.ones(3, 12).long()
    mask[1] = 0
    out = memory_model(random_tokens(3, 12, seed=2), attention_mask=mask, state=state)
    after = state.commit(out.new_entries)
    assert_same_state(after.select_rows(row), fork.select_rows(row))
    none = memory_model(random_tokens(3, 4), attention_mask=torch.zeros(3, 4), state=after)
    assert_same_state(after.commit(none.new_entries), after)


@torch.no_grad()
def test_rows_that_have_ended_ask_for_no_logits(monkeypatch):
    memory_model, wanted = make("XL cache"), []
    decoder, mask = memory_model.model, torch.ones(2, 28).long()
    mask[1, :-3] = 0
    read_window = decoder.predict

    def predict(hidden, **arguments):
        wanted.append(hidden.shape[1])
        return read_window(hidden, **arguments)

    monkeypatch.setattr(decoder, "predict", predict)
    memory_model(random_tokens(2, 28), attention_mask=mask, logits_to_keep=7)
    # the three tokens of the short row, and the last segment of the long one
    assert wanted == [3, TEXT]


def test_trainers_count_labels_as_for_any_language_model():
    # the first is not predicted; a Decoder has no such word of its own
    assert make("alone").loss_type == "ForCausalLM"


@kinds
@torch.no_grad()
def test_a_new_document_forgets_the_one_before(kind):
    memory_model, ids = make(kind), random_tokens(2, 19)
    _, state = read(memory_model, random_tokens(2, 17, seed=4))
    starts = torch.tensor([True, False])
    other = memory_model(ids[:, :TEXT], state=state, document_start=starts)
    state = state.commit(other.new_entries)
    logits, _ = read(memory_model, ids[:, TEXT:], state)
    fresh, _ = read(memory_model, ids)
    close(torch.cat([other.logits, logits], dim=1)[0], fresh[0])
    assert state.position.tolist() == [7, 24]


@kinds
@torch.no_grad()
def test_a_saved_state_goes_on_in_the_middle_of_a_document(kind, tmp_path):
    memory_model, ids = make(kind), random_tokens(2, 31)
    _, state = read(memory_model, ids[:, :17])
    memory_model.save_state(state, tmp_path / "state")
    loaded = memory_model.load_state(tmp_path / "state")
    assert_same_state(loaded, state)
    assert_same_state(state.fork(), state)
    mine, end = read(memory_model, ids[:, 17:], loaded)
    theirs, other = read(memory_model, ids[:, 17:], state)
    assert torch.equal(mine, theirs)
    assert_same_state(end, other)


@knn_kinds
@torch.no_grad()
def test_a_committed_state_is_used_up_and_a_fork_is_not(kind, tmp_path):
    memory_model, ids = make(kind), random_tokens(2, 14)
    _, state = read(memory_model, ids)
    fork = state.fork()
    out = memory_model(ids, state=state)
    after = state.commit(out.new_entries)
    with pytest.raises(MemoryStateError, match=r"fork\(\) before commit"):
        memory_model(ids, state=state)
    with pytest.raises(MemoryStateError, match=r"fork\(\) before commit"):
        memory_model.save_state(state, tmp_path / "state")
    assert torch.equal(memory_model(ids, state=fork).logits, out.logits)
    assert_same_state(fork.commit(out.new_entries), after)


@torch.no_grad()
def test_an_xl_cache_is_used_up_by_nothing():
    memory_model, ids = make("XL cache"), random_tokens(2, 17)
    _, state = read(memory_model, ids)
    out = memory_model(ids, state=state)
    after = [state.commit(out.new_entries) for _ in range(2)]
    assert_same_state(*after)
    assert torch.equal(memory_model(ids, state=state).logits, out.logits)
    assert out.new_entries.inner_entries == ()


def test_training_reads_and_learns_from_all_memories():
    memory_model = make("both", bptt_depth=3, replay=True).train()
    ids, state = random_tokens(2, 43), memory_model.new_state(2)
    for start in (0, 21):
        piece = slice(start, start + 21)
        out = memory_model(ids[:, piece], targets=ids[:, start + 1 : start + 22], state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
    assert not state.memory.requires_grad
    assert all(weight.grad.isfinite().all() for weight in memory_model.parameters())
    assert memory_model.model.blocks[1].attention.mix.gate_bias.grad.any()


def test_a_commit_before_the_backward_pass_of_replay_is_refused():
    memory_model, ids = make("both", replay=True), random_tokens(2, 21)
    state = memory_model.new_state(2)
    out = memory_model(ids, labels=ids, state=state)
    state.commit(out.new_entries)
    with pytest.raises(MemoryStateError, match=r"fork\(\) before commit"):
        out.loss.backward()


@kinds
@pytest.mark.parametrize("length", [1, 7, 16])
@torch.no_grad()
def test_greedy_equals_recomputation_across_segments(kind, length):
    memory_model, ids = make(kind), random_tokens(2, length)
    new, state = memory_model.generate(ids, max_new_tokens=17)
    logits, end = read(memory_model, torch.cat([ids, new], dim=1))
    assert torch.equal(logits[:, length - 1 : -1].argmax(dim=-1), new)
    assert_same_state(state, end)


@pytest.mark.parametrize("kind", ["XL cache", "both"])
def test_generation_of_other_rows_changes_nothing(kind):
    memory_model, texts = make(kind), [random_tokens(1, length) for length in (3, 7, 18)]
    ids, mask = torch.zeros(3, 18).long(), torch.zeros(3, 18).long()
    for row, text in enumerate(texts):
        ids[row, 18 - text.shape[1] :], mask[row, 18 - text.shape[1] :] = text, 1
    together, _ = memory_model.generate(ids, attention_mask=mask, max_new_tokens=9)
    for row, text in enumerate(texts):
        alone, _ = memory_model.generate(text, max_new_tokens=9)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("pad", [30, -100])
def test_a_row_that_ends_is_filled_and_stands_still(pad):
    memory_model, ids = make("both"), random_tokens(2, 5)
    whole, _ = memory_model.generate(ids, max_new_tokens=20)
    end = int(whole[0, 4])
    stops = [row.tolist().index(end) + 1 if end in row else 20 for row in whole]
    new, state = memory_model.generate(ids, max_new_tokens=20, eos_token_id=end, pad_token_id=pad)
    assert new.shape[1] == max(stops)
    for row, stop in enumerate(stops):
        assert torch.equal(new[row, :stop], whole[row, :stop])
        assert set(new[row, stop:].tolist()) <= {pad}
    assert len(set(stops)) == 2
    assert state.position.tolist() == [5 + stop for stop in stops]


def test_sampling_follows_its_generator():
    memory_model, ids = make("XL cache"), random_tokens(2, 5)
    draws = [
        memory_model.generate(
            ids,
            max_new_tokens=12,
            sampling=SamplingConfig(temperature=2.0),
            generator=torch.Generator().manual_seed(seed),
        )[0]
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_options_it_has_not_are_refused():
    memory_model = make("alone")
    with pytest.raises(ValueError, match=r"options eos_token_id, .*, got num_beams\. sampling="):
        memory_model.generate(random_tokens(1, 3), max_new_tokens=2, num_beams=3)
    with pytest.raises(ValueError, match="alignment must be 'left' to generate"):
        make("alone", alignment="right").generate(random_tokens(1, 3), max_new_tokens=2)


@pytest.mark.parametrize("with_model", [False, True])
@torch.no_grad()
def test_it_is_saved_with_or_without_the_decoder(with_model, tmp_path):
    memory_model, ids = make("both"), random_tokens(2, 31)
    memory_model.save_pretrained(tmp_path / "memory", with_model=with_model)
    decoder = None if with_model else memory_model.model
    loaded = RecurrentMemory.from_pretrained(decoder, tmp_path / "memory")
    assert loaded.memory_config == memory_model.memory_config
    assert torch.equal(read(loaded, ids)[0], read(memory_model, ids)[0])


def test_the_memory_of_another_model_is_refused(tmp_path):
    make("both").save_pretrained(tmp_path / "memory")
    other = tiny_decoder(tiny_config(segment_length=11, embed_dim=29))
    with pytest.raises(
        CheckpointError, match=r"byheart-decoder model of width 23, got .* width 29"
    ):
        RecurrentMemory.from_pretrained(other, tmp_path / "memory")
    with pytest.raises(CheckpointError, match="not the byheart-decoder model"):
        RecurrentMemory.from_pretrained(None, tmp_path / "memory")


def test_states_of_other_decoders_are_refused(tmp_path):
    both, ids = make("both"), random_tokens(2, 14)
    for kind, message in (
        ("alone", r"it has inner none \(not XL cache or kNN memory\)"),
        ("XL cache", r"it has knn_memory.layers \(\) \(not \(1,\)\)"),
        ("kNN memory", r"it has xl_cache_length 0 \(not 11\)"),
    ):
        other = make(kind)
        state = other.new_state(2)
        with pytest.raises(MemoryStateError, match=message):
            both(ids, state=state)
        with pytest.raises(MemoryStateError, match=message):
            both.new_state(2).commit(other(ids, state=state).new_entries)
        other.save_state(state, tmp_path / kind)
        with pytest.raises(MemoryStateError, match=message):
            both.load_state(tmp_path / kind)


def test_states_saved_before_decoders_had_memory_are_read(tmp_path):
    memory_model = make("alone")
    _, state = read(memory_model, random_tokens(2, 17))
    memory_model.save_state(state.fork(), tmp_path / "state")
    manifest = tmp_path / "state" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["layout"]["inner"]
    manifest.write_text(json.dumps(content))
    assert_same_state(memory_model.load_state(tmp_path / "state"), state)


def test_a_larger_knn_memory_can_be_read_and_saved(tmp_path):
    memory_model, ids = make("both"), random_tokens(2, 49)
    state = memory_model.new_state(2)
    state = replace(state, inner=memory_model.model.new_state(2, memory_size=97))
    _, state = read(memory_model, ids, state)
    memory_model.save_state(state, tmp_path / "state")
    assert_same_state(memory_model.load_state(tmp_path / "state"), state)
    assert state.inner.memory_size == 97


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_length": 8}, r"must be text and memory tokens, 12 .*, got 11\. Set"),
        ({"alignment": "right"}, "alignment must be 'left' for a Decoder with an XL cache"),
        ({"start_ids": (1,)}, "must be empty for a decoder"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    decoder = tiny_decoder(tiny_config(segment_length=11))
    settings = {"segment_length": 7, "num_memory_tokens": 2, **settings}
    with pytest.raises(ValueError, match=message):
        RecurrentMemory(decoder, RecurrentMemoryConfig(**settings))


def test_unknown_tokens_are_refused():
    with pytest.raises(ValueError, match="input_ids must be between 0 and 30, got"):
        make("alone")(torch.full((1, 3), 31))
