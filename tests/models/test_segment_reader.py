"""Recurrent memory around a Decoder's windows: gradients, replay, and whose memory is read."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.models.recurrent import RecurrentCore
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.models.segment_reader import SegmentReader, inner_layout, require_decoder_fits
from byheart.models.text_output import TextRequest
from byheart.models.window import build_window
from byheart.models.window_model import Segment
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
TEXT, MEMORY, ROWS = 7, 2, 3
WINDOW = TEXT + 2 * MEMORY
XL = {"memory_size": 0, "segment_length": WINDOW, "xl_cache_length": WINDOW}
KINDS = {
    "alone": {**XL, "xl_cache_length": 0},
    "XL cache": XL,
    "short XL cache": {**XL, "xl_cache_length": 5},
    "kNN memory": {"segment_length": WINDOW, "xl_cache_length": 0},
    "both": {"segment_length": WINDOW, "xl_cache_length": WINDOW},
    "evicted": {
        "segment_length": WINDOW,
        "xl_cache_length": 5,
        "memory": KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, write="evicted"),
    },
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_core(**changes):
    config = RecurrentMemoryConfig(segment_length=TEXT, num_memory_tokens=MEMORY, **changes)
    torch.manual_seed(3)
    return RecurrentCore(config, 23, mean=torch.zeros(23), std=torch.full((23,), 0.5))


@torch.no_grad()
def make_reader(decoder, *, past=0):
    """Read with a decoder, if it has memory of its own with one that holds `past` segments."""
    if inner_layout(decoder) is None:
        return SegmentReader(decoder)
    state = decoder.new_state(ROWS)
    for piece in random_tokens(ROWS, past * WINDOW, seed=9).split(WINDOW, dim=1):
        if past:
            state = state.commit(decoder(piece, state=state).new_entries)
    return SegmentReader(decoder, state)


def make_segments(count, *, losses=None, tokens=None):
    losses = {count - 1} if losses is None else set(losses)
    tokens = random_tokens(ROWS, count * TEXT) if tokens is None else tokens
    targets = random_tokens(ROWS, count * TEXT, seed=2)
    return [
        Segment(
            input_ids=tokens[:, index * TEXT : (index + 1) * TEXT],
            num_tokens=None,
            rows=None,
            writes_memory=None,
            request=TextRequest(
                num_columns=TEXT,
                targets=targets[:, index * TEXT : (index + 1) * TEXT],
                logits=True,
            )
            if index in losses
            else None,
            has_loss=index in losses,
        )
        for index in range(count)
    ]


def first_memory(core):
    return core.memory.expand(ROWS, -1, -1)


def gradients(core, decoder, segments, *, seed=5):
    core.zero_grad(), decoder.zero_grad()
    torch.manual_seed(seed)
    reader = make_reader(decoder, past=2)
    outputs, memory, reader, _ = core.unroll(reader, segments, first_memory(core))
    loss = sum(out.token_losses.sum() for out in outputs if out is not None)
    loss.backward()
    named = itertools.chain(core.named_parameters(), decoder.named_parameters())
    grads = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}
    return grads, loss.detach(), memory.detach(), reader


@pytest.mark.parametrize("kind", ["alone", "XL cache", "both"])
@pytest.mark.parametrize(
    "settings", [{}, {"bptt_depth": 2}, {"noise": 0.1, "update": "gated"}], ids=str
)
@pytest.mark.parametrize("losses", [[4], [0, 3, 4]])
def test_replay_is_full_bptt(kind, settings, losses):
    decoder = tiny_decoder(tiny_config(**KINDS[kind], dropout=0.2)).train()
    segments = make_segments(5, losses=losses)
    full = gradients(make_core(**settings), decoder, segments)
    mine = gradients(make_core(**settings, replay=True), decoder, segments)
    close(mine[:3], full[:3])


@kinds
def test_the_next_reader_does_not_depend_on_depth_and_replay(kind):
    decoder, segments = tiny_decoder(tiny_config(**KINDS[kind])), make_segments(6, losses=[1, 3])
    *_, expected = gradients(make_core(), decoder, segments)
    for settings in ({"bptt_depth": 2}, {"bptt_depth": 1, "replay": True}):
        *_, reader = gradients(make_core(**settings), decoder, segments)
        assert len(reader.entries) == len(expected.entries)
        for mine, theirs in zip(reader.entries, expected.entries, strict=True):
            close(mine.layers, theirs.layers)
            assert torch.equal(mine.position, theirs.position)
        if expected.state is not None:
            close(reader.state.xl_cache, expected.state.xl_cache)
            assert torch.equal(reader.state.position, expected.state.position)


@pytest.mark.parametrize("kind", ["XL cache", "both"])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("depth", [1, 2, None])
def test_each_loss_reaches_bptt_depth_segments(kind, depth, replay):
    decoder, core = (
        tiny_decoder(tiny_config(**KINDS[kind])),
        make_core(bptt_depth=depth, replay=replay),
    )
    # segment s holds token s + 1 alone; a score of token 0 has no other gradient of those
    tokens = (1 + torch.arange(5)).repeat_interleave(TEXT).expand(ROWS, -1)
    segments = make_segments(5, losses=range(5), tokens=tokens)
    outputs = core.unroll(make_reader(decoder, past=2), segments, first_memory(core)).outputs
    for index, out in enumerate(outputs):
        weights = [decoder.embedding.weight, core.memory]
        found, memory = torch.autograd.grad(
            out.logits[..., 0].sum(), weights, retain_graph=True, materialize_grads=True
        )
        first = 0 if depth is None else max(0, index + 1 - depth)
        reached = found[1:].abs().sum(dim=1).nonzero()[:, 0].tolist()
        assert reached == list(range(first, index + 1))
        assert bool(memory.any()) == (first == 0)


@pytest.mark.parametrize("kind", ["kNN memory", "both", "evicted"])
@torch.no_grad()
def test_a_call_reads_the_knn_memory_that_was_there_when_it_began(kind):
    decoder, core = tiny_decoder(tiny_config(**KINDS[kind])), make_core()
    state = make_reader(decoder, past=2).state
    segments = make_segments(3)
    outputs, memory, reader, _ = core.unroll(
        SegmentReader(decoder, state), segments, first_memory(core)
    )
    # by hand: every segment reads the same ring, and the XL cache of the segment before
    cache, before = state, first_memory(core).float()
    for segment in segments:
        window = torch.cat([before, decoder.embedding(segment.input_ids), before], dim=1)
        hidden, new = decoder.read_embeddings(window, state=cache)
        cache, before = cache.read_on(new), hidden[:, -MEMORY:]
    close(memory, before)
    close(outputs[-1].logits, decoder.predict(hidden[:, MEMORY:-MEMORY], targets=None,
                                              logits=True)[1])  # fmt: skip
    assert torch.equal(state.stores[1].num_written, reader.state.stores[1].num_written)
    assert len(reader.entries) == 3
    read_again = core.unroll(SegmentReader(decoder, state), segments, first_memory(core))
    assert torch.equal(read_again.memory, memory)


@torch.no_grad()
def test_without_a_knn_memory_nothing_piles_up():
    decoder = tiny_decoder(tiny_config(**XL))
    core = make_core()
    reader = core.unroll(make_reader(decoder), make_segments(5), first_memory(core)).reader
    assert reader.entries == ()
    assert reader.state.position.tolist() == [5 * WINDOW] * ROWS


@kinds
@torch.no_grad()
def test_unfinished_segments_and_rows_without_text_enter_no_memory(kind):
    decoder, core = tiny_decoder(tiny_config(**KINDS[kind])), make_core()
    whole, ragged = make_segments(2)
    ragged = replace(
        ragged,
        num_tokens=torch.tensor([4, 0, TEXT]),
        writes_memory=torch.tensor([False, False, True]),
    )
    before = core.unroll(make_reader(decoder), [whole], first_memory(core))
    after = core.unroll(before.reader, [ragged], before.memory)
    assert torch.equal(after.memory[:2], before.memory[:2])
    assert not torch.equal(after.memory[2], before.memory[2])
    if after.reader.state is not None:
        state = after.reader.state
        assert state.position.tolist() == [WINDOW, WINDOW, 2 * WINDOW]
        assert state.pending is None
        for mine, theirs in zip(state.xl_cache, before.reader.state.xl_cache, strict=True):
            assert torch.equal(mine.keys[:2], theirs.keys[:2])
    assert [entries.num_tokens.tolist() for entries in after.reader.entries[1:]] in (
        [],
        [[0, 0, WINDOW]],
    )


@torch.no_grad()
def test_reading_on_moves_the_xl_cache_as_a_commit_does_and_leaves_the_state():
    for kind in ("XL cache", "both", "evicted"):
        decoder = tiny_decoder(tiny_config(**KINDS[kind]))
        tokens = random_tokens(ROWS, 3 * WINDOW)
        state = decoder.new_state(ROWS)
        # pieces that end inside of a segment, at its end, and in the next one
        for start, stop in ((0, 4), (4, 9), (9, 11), (11, 22), (22, 25)):
            new = decoder(tokens[:, start:stop], state=state).new_entries
            moved, copy = state.read_on(new), state.fork()
            state = state.commit(new)
            for name in ("num_cached", "num_pending", "position"):
                assert torch.equal(getattr(moved, name), getattr(state, name))
            close(moved.xl_cache, state.xl_cache)
            assert (moved.pending is None) == (state.pending is None)
            if copy.stores:
                assert torch.equal(moved.stores[1].num_written, copy.stores[1].num_written)


@torch.no_grad()
def test_two_ways_on_from_one_state_share_no_pending_tokens():
    decoder = tiny_decoder(tiny_config(**XL))
    pieces = [random_tokens(ROWS, 4, seed=seed) for seed in range(4)]
    state = decoder.new_state(ROWS)
    state = state.commit(decoder(pieces[0], state=state).new_entries)
    first = state.read_on(decoder(pieces[1], state=state).new_entries)
    logits = decoder(pieces[3][:, :3], state=first).logits
    state.read_on(decoder(pieces[2], state=state).new_entries)
    assert torch.equal(decoder(pieces[3][:, :3], state=first).logits, logits)


def test_a_row_without_text_is_all_padding():
    core, embed = make_core(), torch.nn.Embedding(31, 23)
    tokens, counts = random_tokens(ROWS, TEXT), torch.tensor([TEXT, 0, 3])
    window = build_window(core.config, embed, first_memory(core), tokens, counts, writes=True)
    assert window.mask.sum(dim=1).tolist() == [WINDOW, 0, 3 + 2 * MEMORY]


@torch.no_grad()
def test_embeddings_of_tokens_are_read_as_the_tokens():
    decoder = tiny_decoder(tiny_config(**XL))
    tokens = random_tokens(ROWS, 9)
    hidden, entries = decoder.read_embeddings(decoder.embedding(tokens))
    out = decoder(tokens)
    assert torch.equal(decoder.predict(hidden, targets=None, logits=True)[1], out.logits)
    for mine, theirs in zip(entries.layers, out.new_entries.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize(
    ("decoder", "memory", "message"),
    [
        (
            {"segment_length": 16, "xl_cache_length": 7},
            {},
            r"must be text and memory tokens, 11 \(7 text and twice 2 memory\), got 16\. Set "
            r"segment_length to 11 in DecoderConfig",
        ),
        ({"segment_length": 10, "xl_cache_length": 0, "memory_size": 41}, {}, "got 10. Set"),
        ({"segment_length": 11, "xl_cache_length": 7}, {"alignment": "right"}, "got 'right'"),
        (
            {"segment_length": 10, "xl_cache_length": 0},
            {},
            r"must fit into the Decoder's segment of 10 tokens, got 11 .* at least 11 in",
        ),
        (
            {"segment_length": 11, "xl_cache_length": 0, "window_length": 9},
            {},
            "looks 9 tokens back, and the segment has 11. .* at least 10",
        ),
    ],
)
def test_what_does_not_fit_names_the_setting(decoder, memory, message):
    config = tiny_config(**{"memory_size": 0, **decoder})
    with pytest.raises(ValueError, match=message):
        require_decoder_fits(
            config, RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2, **memory)
        )


def test_what_fits_is_accepted():
    memory = RecurrentMemoryConfig(segment_length=7, num_memory_tokens=2, alignment="right")
    require_decoder_fits(tiny_config(memory_size=0, segment_length=16, xl_cache_length=0), memory)
    require_decoder_fits(
        tiny_config(memory_size=0, segment_length=11, xl_cache_length=0, window_length=10), memory
    )
