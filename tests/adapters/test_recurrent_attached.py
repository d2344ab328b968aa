"""Recurrent memory on a pretrained decoder with an XL cache and a kNN memory attached to it."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from recurrent_states import assert_same_inner, assert_same_state, read

from byheart import KnnMemoryConfig, read_tokens
from byheart.adapters.attach import attach
from byheart.adapters.recurrent import RecurrentMemory
from byheart.errors import CheckpointError, MemoryStateError
from byheart.models.recurrent_config import RecurrentMemoryConfig

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
TEXT, MEMORY = 7, 2
FAMILIES = ["llama", "gpt2", "qwen3"]
KNN = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5)
KINDS = {
    "alone": {},
    "XL cache": {"xl_cache_length": 11},
    "short XL cache": {"xl_cache_length": 5},
    "kNN memory": {"knn": KNN},
    "both": {"xl_cache_length": 11, "knn": KNN},
    "evicted": {"xl_cache_length": 5, "knn": replace(KNN, write="evicted")},
}
kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("name", FAMILIES)
streaming_kinds = pytest.mark.parametrize("kind", ["alone", "XL cache", "short XL cache"])
knn_kinds = pytest.mark.parametrize("kind", ["kNN memory", "both", "evicted"])


@pytest.fixture
def make(tiny_model):
    """Attach a memory whose gates are open, and put recurrent memory around it."""

    def build(name, kind, *, tokens=MEMORY, model=(), **changes):
        # a document of gpt2 must fit into its positions, memory tokens included
        places = {"n_positions": 160} if name == "gpt2" else {"max_position_embeddings": 160}
        below = tiny_model(name, **{**places, **dict(model)})
        attached = attach(below, segment_length=TEXT + 2 * tokens, **KINDS[kind])
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in attached.memory_parameters():
                weight.add_(0.5 * torch.randn_like(weight))
        config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=tokens, **changes)
        return RecurrentMemory(attached, config).eval()

    return build


# the other kinds of memory: below, with three families
@pytest.mark.parametrize("kind", ["XL cache", "both"])
def test_without_memory_tokens_it_is_the_attached_model(attachable, kind, make, draw):
    memory_model, ids = make(attachable.name, kind, tokens=0), draw(2, 31)
    attached = memory_model.model
    base = read_tokens(attached, ids, attached.new_state(2), return_logits=True)
    logits, state = read(memory_model, ids)
    exact(logits, base.logits)
    if kind == "XL cache":
        with torch.no_grad():
            exact(memory_model(ids).logits, base.logits)
    whole = read_tokens(attached, ids[:, :28], attached.new_state(2)).state
    assert_same_inner(state.inner, whole)


@families
def test_without_anything_attached_it_is_recurrent_memory_on_the_model(
    name, make, tiny_model, wrap, draw
):
    plain = wrap(tiny_model(name), segment_length=TEXT, num_memory_tokens=MEMORY)
    memory_model, ids = make(name, "alone", model={"max_position_embeddings": 64}), draw(2, 31)
    memory_model.memory.load_state_dict(plain.memory.state_dict())
    if name == "gpt2":  # of as many positions
        memory_model.model.model.load_state_dict(plain.model.state_dict(), strict=False)
    with torch.no_grad():
        exact(memory_model(ids).logits, plain(ids).logits)


@kinds
@families
def test_a_window_is_a_segment_of_the_attached_model(name, kind, make, draw):
    memory_model, ids = make(name, kind), draw(2, 28)
    attached, embedding = memory_model.model, memory_model.model.input_embedding()
    logits, _ = read(memory_model, ids)
    state, memory = attached.new_state(2), memory_model.memory.memory.detach().expand(2, -1, -1)
    taken = []
    head = attached.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    places = torch.arange(4).view(2, 2)
    for start in range(0, 28, TEXT):
        window = torch.cat([places, ids[:, start : start + TEXT], places], dim=1)

        def with_memory(_, inputs, found, memory=memory):
            return torch.cat([memory, found[:, MEMORY:-MEMORY], memory], dim=1)

        handle = embedding.register_forward_hook(with_memory)
        with torch.no_grad():
            out = attached(window, state=state)
        handle.remove()
        state, memory = state.commit(out.new_entries), taken[-1][:, -MEMORY:]
        exact(logits[:, start : start + TEXT], out.logits[:, MEMORY:-MEMORY])


@families
def test_an_xl_cache_shows_the_segment_before(name, make, draw):
    memory_model, ids = make(name, "XL cache", tokens=0), draw(2, 21)
    other = ids.clone()
    other[:, 10] = draw(2, 1, seed=5)[:, 0]
    with torch.no_grad():
        mine, theirs = memory_model(ids).logits, memory_model(other).logits
        without = make(name, "alone", tokens=0)(ids).logits
    # no memory token carries it: what differs behind the segment was seen in the cache
    assert torch.equal(mine[:, :10], theirs[:, :10])
    assert not torch.allclose(mine[:, 14:], theirs[:, 14:], atol=1e-3)
    assert not torch.allclose(mine[:, 7:], without[:, 7:], atol=1e-3)
    close(mine[:, :7], without[:, :7])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_memory_tokens_stand_in_the_cache(name, make, draw):
    memory_model, ids = make(name, "XL cache"), draw(2, 14)
    _, state = read(memory_model, ids)
    assert state.inner.num_cached.tolist() == [11, 11]
    assert state.inner.position.tolist() == [22, 22]
    # without the memory that is passed on, the cache alone still tells of the segment before
    forgotten = replace(state, memory=torch.zeros_like(state.memory))
    hidden = replace(forgotten, inner=state.inner.without_xl_cache())
    logits = [read(memory_model, ids[:, :TEXT], past)[0] for past in (state, forgotten, hidden)]
    for one, two in itertools.combinations(logits, 2):
        assert not torch.allclose(one, two, atol=1e-3)


@streaming_kinds
@families
def test_it_streams_in_any_pieces(name, kind, make, draw):
    memory_model, ids, targets = make(name, kind), draw(2, 31), draw(2, 31, seed=2)
    with torch.no_grad():
        whole = memory_model(ids, targets=targets, logits_to_keep=31)
    end = memory_model.new_state(2).commit(whole.new_entries)
    for cuts in ([7] * 4 + [3], [1, 2, 11, 17], [14, 17], [30, 1]):
        state, logits, losses = memory_model.new_state(2), [], []
        for piece, wanted in zip(ids.split(cuts, 1), targets.split(cuts, 1), strict=True):
            with torch.no_grad():
                out = memory_model(
                    piece, targets=wanted, logits_to_keep=piece.shape[1], state=state
                )
            state = state.commit(out.new_entries)
            logits.append(out.logits)
            losses.append(out.token_losses)
        close(torch.cat(logits, dim=1), whole.logits)
        close(torch.cat(losses, dim=1), whole.token_losses)
        assert_same_state(state, end)


@knn_kinds
@families
def test_pieces_inside_of_a_segment_change_nothing(name, kind, make, draw):
    memory_model, ids = make(name, kind), draw(2, 28)
    logits, end = read(memory_model, ids)
    for cuts in ([3, 4], [1, 1, 5], [6, 1]):
        state, parts = memory_model.new_state(2), []
        for piece in ids.split(cuts * 4, dim=1):
            part, state = read(memory_model, piece, state)
            parts.append(part)
        close(torch.cat(parts, dim=1), logits)
        assert_same_state(state, end)


@knn_kinds
def test_the_knn_memory_is_frozen_in_a_call_and_committed_in_order(kind, make, draw):
    memory_model, ids = make("llama", kind), draw(2, 42)
    _, before = read(memory_model, ids[:, :14])
    with torch.no_grad():
        out = memory_model(ids[:, 14:], state=before)
        again = memory_model(ids[:, 14:], state=before)
    assert len(out.new_entries.inner_entries) == 4
    assert torch.equal(again.logits, out.logits)
    by_hand, count = before.inner.fork(), before.inner.stores[1].num_written
    for entries in out.new_entries.inner_entries:
        by_hand = by_hand.commit(entries)
    after = before.commit(out.new_entries)
    assert_same_inner(after.inner, by_hand)
    assert (after.inner.stores[1].num_written > count).all()
    with pytest.raises(MemoryStateError, match=r"fork\(\) before commit"):
        memory_model(ids, state=before)


@pytest.mark.parametrize("side", ["left", "right"])
@kinds
@families
def test_a_ragged_batch_is_its_rows_alone(name, kind, side, make, draw):
    memory_model, lengths = make(name, kind), (23, 5, 14, 1, 22)
    rows = [draw(1, length, seed=length) for length in lengths]
    past = draw(len(rows), 14, seed=3)
    ids, mask = torch.zeros(5, 25).long(), torch.zeros(5, 25).long()
    for index, row in enumerate(rows):
        start = 0 if side == "right" else 25 - row.shape[1]
        place = slice(start, start + row.shape[1])
        ids[index, place], mask[index, place] = row, 1
    _, state = read(memory_model, past)
    with torch.no_grad():
        out = memory_model(ids, attention_mask=mask, state=state, logits_to_keep=25)
    after = state.commit(out.new_entries)
    for index, row in enumerate(rows):
        _, mine = read(memory_model, past[[index]])
        with torch.no_grad():
            alone = memory_model(row, state=mine)
        close(out.logits[index][mask[index].bool()], alone.logits[0])
        assert_same_state(after.select_rows(torch.tensor([index])), mine.commit(alone.new_entries))


@kinds
def test_a_row_of_padding_keeps_its_memory(kind, make, draw):
    memory_model = make("llama", kind)
    _, state = read(memory_model, draw(3, 17))
    row, fork = torch.tensor([1]), state.fork()
    mask = torch.ones(3, 12).long()
    mask[1] = 0
    with torch.no_grad():
        out = memory_model(draw(3, 12, seed=2), attention_mask=mask, state=state)
    after = state.commit(out.new_entries)
    assert_same_state(after.select_rows(row), fork.select_rows(row))


@kinds
@families
def test_a_new_document_forgets_the_one_before(name, kind, make, draw):
    memory_model, ids = make(name, kind), draw(2, 19)
    _, state = read(memory_model, draw(2, 17, seed=4))
    starts = torch.tensor([True, False])
    with torch.no_grad():
        other = memory_model(ids[:, :TEXT], state=state, document_start=starts)
    state = state.commit(other.new_entries)
    logits, _ = read(memory_model, ids[:, TEXT:], state)
    fresh, _ = read(memory_model, ids)
    close(torch.cat([other.logits, logits], dim=1)[0], fresh[0])
    assert state.position.tolist() == [7, 24]


@kinds
@families
def test_a_saved_state_goes_on_in_the_middle_of_a_document(name, kind, make, draw, tmp_path):
    memory_model, ids = make(name, kind), draw(2, 31)
    _, state = read(memory_model, ids[:, :17])
    memory_model.save_state(state, tmp_path / "state")
    loaded = memory_model.load_state(tmp_path / "state")
    assert_same_state(loaded, state)
    mine, end = read(memory_model, ids[:, 17:], loaded)
    theirs, other = read(memory_model, ids[:, 17:], state)
    assert torch.equal(mine, theirs)
    assert_same_state(end, other)


def gradients(memory_model, ids, mask, state=None):
    memory_model.zero_grad()
    torch.manual_seed(11)
    out = memory_model(ids, attention_mask=mask, labels=ids, state=state)
    out.loss.backward()
    return {
        name: weight.grad
        for name, weight in memory_model.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("kind", ["XL cache", "short XL cache", "both"])
@families
def test_replay_has_the_gradients_of_full_bptt_with_dropout(name, kind, depth, make, draw):
    drop = {} if name == "gpt2" else {"attention_dropout": 0.3}  # gpt2 has its own
    mask = torch.ones(3, 31).long()
    mask[0, 9:] = 0
    mask[2, 20:] = 0
    found = []
    for replay in (False, True):
        settings = {"bptt_depth": depth, "noise": 0.1, "replay": replay}
        memory_model = make(name, kind, model=drop, **settings)
        _, state = read(memory_model, draw(3, 21, seed=9))
        found.append(gradients(memory_model.train(), draw(3, 31), mask, state))
    assert found[0].keys() == found[1].keys()
    assert found[0]["memory.memory"] is not None
    for weight in found[0]:
        exact(found[1][weight], found[0][weight], rtol=1e-5, msg=weight)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, None])
@families
def test_each_loss_reaches_bptt_depth_segments(name, depth, replay, make):
    # the XL cache carries no gradient: segment s holds one token alone, whose embedding tells
    memory_model = make(
        name, "XL cache", bptt_depth=depth, replay=replay, model={"tie_word_embeddings": False}
    )
    ids = 3 + torch.arange(5).repeat_interleave(TEXT)[None]
    out = memory_model(ids, targets=ids)
    embedding = memory_model.model.input_embedding().weight
    for index in range(5):
        loss = out.token_losses[0, TEXT * index : TEXT * (index + 1)].sum()
        (tokens,) = torch.autograd.grad(loss, [embedding], retain_graph=True)
        reached = [bool(tokens[3 + segment].any()) for segment in range(5)]
        first = 0 if depth is None else max(0, index + 1 - depth)
        assert reached == [first <= segment <= index for segment in range(5)]


def test_the_xl_cache_alone_has_no_gradient(make, draw):
    memory_model = make("llama", "XL cache", tokens=0, model={"tie_word_embeddings": False})
    ids = 3 + torch.arange(3).repeat_interleave(TEXT)[None]
    loss = memory_model(ids, targets=ids).token_losses[0, -TEXT:].sum()
    loss.backward()
    grad = memory_model.model.input_embedding().weight.grad
    assert [bool(grad[token].any()) for token in (3, 4, 5)] == [False, False, True]


def test_training_reads_and_learns_from_all_memories(make, draw):
    memory_model = make("llama", "both", bptt_depth=3, replay=True).train()
    ids, state = draw(2, 43), memory_model.new_state(2)
    for start in (0, 21):
        piece = slice(start, start + 21)
        out = memory_model(ids[:, piece], targets=ids[:, start + 1 : start + 22], state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
    assert not state.memory.requires_grad
    assert all(weight.grad.isfinite().all() for weight in memory_model.parameters())
    assert all(weight.grad.any() for weight in memory_model.model.memory_parameters())


@pytest.mark.parametrize("length", [1, 7, 16])
@kinds
@families
def test_greedy_equals_recomputation_across_segments(name, kind, length, make, draw):
    memory_model, ids = make(name, kind), draw(2, length)
    new, state = memory_model.generate(ids, max_new_tokens=17, do_sample=False, eos_token_id=None)
    assert new.shape == (2, 17)
    logits, end = read(memory_model, torch.cat([ids, new], dim=1))
    assert torch.equal(logits[:, length - 1 : -1].argmax(dim=-1), new)
    assert_same_state(state, end)


@pytest.mark.parametrize("kind", ["XL cache", "both"])
@families
def test_generation_of_other_rows_changes_nothing(name, kind, make, draw):
    memory_model, texts = make(name, kind), [draw(1, length) for length in (3, 7, 18)]
    ids, mask = torch.zeros(3, 18).long(), torch.zeros(3, 18).long()
    for row, text in enumerate(texts):
        ids[row, 18 - text.shape[1] :], mask[row, 18 - text.shape[1] :] = text, 1
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    together, _ = memory_model.generate(ids, attention_mask=mask, **options)
    for row, text in enumerate(texts):
        alone, _ = memory_model.generate(text, **options)
        assert torch.equal(together[row], alone[0])


def test_a_row_that_ends_is_filled_and_stands_still(make, draw):
    memory_model, ids = make("llama", "both"), draw(2, 5)
    whole, _ = memory_model.generate(ids, max_new_tokens=20, eos_token_id=None)
    end = int(whole[0, 4])
    stops = [row.tolist().index(end) + 1 if end in row else 20 for row in whole]
    new, state = memory_model.generate(ids, max_new_tokens=20, eos_token_id=end, pad_token_id=30)
    assert new.shape[1] == max(stops)
    for row, stop in enumerate(stops):
        assert torch.equal(new[row, :stop], whole[row, :stop])
        assert set(new[row, stop:].tolist()) <= {30}
    assert state.position.tolist() == [5 + stop for stop in stops]


@pytest.mark.parametrize("kind", ["XL cache", "both"])
def test_documents_are_read_side_by_side(kind, make, draw):
    memory_model = make("qwen3", kind)
    documents = [draw(1, length, seed=length)[0] for length in (30, 3, 15, 8)]
    for found in memory_model.read_documents(documents, rows=2):
        logits, state = read(memory_model, documents[found.index][None])
        close(found.logits, logits[0, -1])
        assert_same_state(found.state, state)


@pytest.mark.parametrize("with_model", [False, True])
@families
def test_it_is_saved_with_or_without_the_attached_model(name, with_model, make, draw, tmp_path):
    memory_model, ids = make(name, "both"), draw(2, 31)
    memory_model.save_pretrained(tmp_path / "memory", with_model=with_model)
    attached = None if with_model else memory_model.model
    loaded = RecurrentMemory.from_pretrained(attached, tmp_path / "memory")
    assert loaded.memory_config == memory_model.memory_config
    assert torch.equal(read(loaded, ids)[0], read(memory_model, ids)[0])


def test_the_memory_of_another_model_is_refused(make, wrap, tiny_model, tmp_path):
    make("llama", "both").save_pretrained(tmp_path / "memory")
    with pytest.raises(CheckpointError, match=r"byheart-memory-model/llama model .*, got a llama"):
        RecurrentMemory.from_pretrained(tiny_model("llama"), tmp_path / "memory")
    wrap(tiny_model("llama")).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"to a llama model .*, got a byheart-memory-model/"):
        RecurrentMemory.from_pretrained(make("llama", "both").model, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not the byheart-memory-model/llama model"):
        RecurrentMemory.from_pretrained(None, tmp_path / "memory")


def test_states_of_other_memories_are_refused(make, draw):
    both, ids = make("llama", "both"), draw(2, 14)
    for kind, message in (
        ("alone", r"it has inner none \(not XL cache or kNN memory\)"),
        ("XL cache", r"it has knn_memory.layers \(\) \(not \(1,\)\)"),
        ("kNN memory", r"it has xl_cache_length 0 \(not 11\)"),
    ):
        with pytest.raises(MemoryStateError, match=message):
            both(ids, state=make("llama", kind).new_state(2))


def test_the_cache_has_the_precision_of_the_model(make, draw):
    memory_model, ids = make("llama", "XL cache"), draw(2, 20)
    memory_model.model.bfloat16()
    _, state = read(memory_model, ids)
    assert memory_model.new_state(2).inner.xl_cache[0].keys.dtype == torch.bfloat16
    assert state.inner.xl_cache[0].keys.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32


@families
def test_the_model_below_an_attached_memory_is_refused(name, tiny_model, wrap, draw):
    model = tiny_model(name)
    attached = attach(model, segment_length=11, xl_cache_length=11)
    with pytest.raises(ValueError, match=r"Pass what attach has returned, .*_model\.detach\(\)"):
        wrap(model)
    attached.detach()
    assert wrap(model)(draw(1, 9)).logits.isfinite().all()


def test_a_memory_that_was_taken_off_is_refused(tiny_model, draw):
    attached = attach(tiny_model("llama"), segment_length=11, xl_cache_length=11)
    config = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2)
    memory_model = RecurrentMemory(attached, config)
    attached.detach()
    with pytest.raises(ValueError, match="The memory was taken off the model"):
        memory_model(draw(1, 9))
    with pytest.raises(ValueError, match="The memory was taken off the model"):
        RecurrentMemory(attached, config)


@pytest.mark.parametrize(
    ("memory", "attached", "message"),
    [
        (
            {},
            {"segment_length": 7, "xl_cache_length": 7},
            r"segment of a MemoryModel .* text and memory tokens, 11 \(7 text and twice 2 memory\),"
            r" got 7\. Set segment_length to 11 in byheart\.attach",
        ),
        ({}, {"segment_length": 16, "knn": KNN}, r"got 16\. Set segment_length to 11 in"),
        ({}, {"segment_length": 10}, r"fit into the MemoryModel's segment .* at least 11 in"),
        (
            {"alignment": "right"},
            {"segment_length": 11, "xl_cache_length": 7},
            "alignment must be 'left' for a MemoryModel",
        ),
        ({"start_ids": (1,)}, {"segment_length": 11}, "must be empty for a decoder"),
    ],
)
def test_what_does_not_fit_is_refused(memory, attached, message, tiny_model):
    model = attach(tiny_model("llama"), **attached)
    settings = {"segment_length": 7, "num_memory_tokens": 2, **memory}
    with pytest.raises(ValueError, match=message):
        RecurrentMemory(model, RecurrentMemoryConfig(**settings))


def test_local_attention_that_loses_the_memory_is_refused(tiny_model):
    model = attach(tiny_model("mistral", sliding_window=9), segment_length=11, xl_cache_length=7)
    with pytest.raises(ValueError, match="no layer of MistralForCausalLM looks farther than 9"):
        RecurrentMemory(model, RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2))


def test_a_document_beyond_the_positions_of_gpt2_is_refused(make, draw):
    # with an XL cache its positions go on: 3 segments of 11 of them, of which 7 are text
    memory_model = make("gpt2", "XL cache", model={"n_positions": 33})
    assert memory_model(draw(1, 21)).logits.isfinite().all()
    with pytest.raises(ValueError, match="a document must fit into the 33 positions of the model"):
        memory_model(draw(1, 22))
    with pytest.raises(ValueError, match="a document must fit into the 33 positions of the model"):
        memory_model.generate(draw(1, 20), max_new_tokens=9)
    # 33 positions are enough for 22 tokens: the last new one is not read
    new, _ = memory_model.generate(draw(1, 10), max_new_tokens=12, eos_token_id=None)
    assert new.shape == (1, 12)
    with pytest.raises(ValueError, match="a document must fit into the 33 positions of the model"):
        memory_model.generate(draw(1, 10), max_new_tokens=13, eos_token_id=None)
    # and without one they begin anew with each segment
    assert make("gpt2", "kNN memory")(draw(1, 300)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["XL cache", "both"])
def test_a_document_beyond_the_positions_of_gpt2_is_refused_before_it_is_read(kind, make, draw):
    memory_model, ids = make("gpt2", kind, model={"n_positions": 33}), draw(2, 7)
    out = memory_model(ids, state=memory_model.new_state(2))
    state = memory_model.new_state(2).commit(out.new_entries)
    calls = []
    handle = memory_model.model.model.transformer.register_forward_pre_hook(
        lambda *_: calls.append(True)
    )
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 5:] = 0  # the other row is too long
    for attempt in (
        lambda: memory_model(draw(2, 15), attention_mask=mask, state=state),
        lambda: memory_model.generate(
            draw(2, 15), attention_mask=mask, state=state, max_new_tokens=2
        ),
        lambda: memory_model.generate(
            draw(2, 3), state=state, max_new_tokens=13, eos_token_id=None
        ),
    ):
        with pytest.raises(ValueError, match="fit into the 33 positions of the model"):
            attempt()
    assert not calls
    handle.remove()
    # nothing was written, so that what fits can still be read
    new, after = memory_model.generate(draw(2, 3), state=state, max_new_tokens=12)
    assert new.shape == (2, 12)
    assert after.inner.position.tolist() == [33, 33]


def test_unknown_tokens_are_refused(make):
    with pytest.raises(ValueError, match="input_ids must be between 0 and 42, got"):
        make("llama", "XL cache")(torch.full((1, 3), 43))
