"""No step asks a device for a value: on a device without values it would fail."""

import contextlib

import pytest
import torch
from step_setup import CONFIGS, SEGMENT, assert_same, assert_same_state, batches, make_config

from byheart.models.decoder import Decoder
from byheart.models.generate import SamplingConfig, choose, generate
from byheart.models.streaming import read_tokens
from byheart.ops import known
from byheart.testing.tiny import random_tokens, tiny_decoder
from byheart.testing.waiting import NeverWaits


@pytest.fixture
def no_autocast(monkeypatch):
    """Keep contexts of autocast away, which there are none of without values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def train(decoder, *, device="cpu", starts_segment=False):
    """Return losses, gradients and the last state of some steps."""
    state, losses = decoder.new_state(2), []
    for batch in batches(device):
        if starts_segment:
            state = state.at_segment_start(batch["document_start"])
        out = decoder(**batch, state=state)
        out.loss.backward()
        state = state.commit(out.new_entries)
        losses.append(out.token_losses.detach())
    return torch.stack(losses), [weight.grad for weight in decoder.parameters()], state


def decode(decoder, tokens):
    """Return the scores after every token, read one at a time."""
    state, scores = decoder.new_state(len(tokens)), []
    with torch.no_grad():
        for column in tokens.split(1, dim=1):
            read = read_tokens(decoder, column, state)
            state = read.state
            scores.append(read.last_logits)
    return torch.stack(scores, dim=1), state


def on_meta(config):
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("starts_segment", [True, False])
def test_a_training_step_needs_no_value(name, starts_segment):
    losses, gradients, state = train(
        on_meta(make_config(name)), device="meta", starts_segment=starts_segment
    )
    assert losses.is_meta
    assert all(gradient.is_meta for gradient in gradients)
    assert state.position.is_meta


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_segments_leave_nothing_pending(name):
    decoder = on_meta(make_config(name))
    state, tokens = decoder.new_state(2), torch.zeros(2, SEGMENT, dtype=torch.long, device="meta")
    for _ in range(3):
        out = decoder(tokens, state=state, targets=tokens)
        out.loss.backward()
        state = state.commit(out.new_entries)
        assert state.pending is None


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoding_step_needs_no_value(name):
    tokens = torch.zeros(2, 9, dtype=torch.long, device="meta")
    scores, _ = decode(on_meta(make_config(name)).eval(), tokens)
    assert scores.is_meta


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generating_without_a_stop_token_needs_no_value(temperature):
    decoder = on_meta(make_config("gate")).eval()
    prompt = torch.zeros(2, 10, dtype=torch.long, device="meta")
    sampling = SamplingConfig(temperature=temperature, top_k=3, top_p=0.9)
    made = generate(decoder, prompt, max_new_tokens=5, sampling=sampling)
    assert made.tokens.shape == (2, 5)
    assert choose(torch.zeros(2, 5, device="meta"), sampling).is_meta


@pytest.fixture
def values_unknown(monkeypatch):
    monkeypatch.setattr(known, "values_are_known", lambda _: False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("starts_segment", [True, False])
@pytest.mark.parametrize("cache", [0, 7, 11])
def test_a_training_step_that_asks_nothing_computes_the_same(
    name, starts_segment, cache, monkeypatch
):
    config = make_config(name, xl_cache_length=cache)
    expected = train(tiny_decoder(config))
    monkeypatch.setattr(known, "values_are_known", lambda _: False)
    decoder = tiny_decoder(config)
    with NeverWaits():
        found = train(decoder, starts_segment=starts_segment)
    assert_same(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoding_step_that_asks_nothing_computes_the_same(name, monkeypatch):
    decoder, tokens = tiny_decoder(make_config(name)), random_tokens(2, 5 * SEGMENT + 3)
    expected, before = decode(decoder, tokens)
    monkeypatch.setattr(known, "values_are_known", lambda _: False)
    with NeverWaits():
        found, after = decode(decoder, tokens)
    torch.testing.assert_close(found, expected)
    assert_same_state(after, before)


def test_a_prompt_is_read_with_one_question(values_unknown, monkeypatch):
    decoder, tokens = tiny_decoder(), random_tokens(2, 24)
    counts = torch.tensor([24, 11])
    questions = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda tensor: questions.append(1) or tolist(tensor)
    )
    with NeverWaits():
        read_tokens(decoder, tokens, decoder.new_state(2), num_tokens=counts, return_logits=True)
    assert questions == [1]


def test_what_the_question_has_told_is_used(values_unknown):
    decoder, tokens = tiny_decoder(), random_tokens(2, 3 * SEGMENT)
    pending = []
    decoder.register_forward_pre_hook(
        lambda _, args, options: pending.append(options["state"].pending is not None),
        with_kwargs=True,
    )
    for counts, expected in (([14, 14], [False, False]), ([14, 16], [False, False, False])):
        pending.clear()
        state = decoder.new_state(2)
        read_tokens(decoder, tokens, state, num_tokens=torch.tensor(counts))
        assert pending == expected
    pending.clear()
    state = read_tokens(decoder, tokens[:, :3], decoder.new_state(2)).state
    read_tokens(decoder, tokens, state, num_tokens=torch.tensor([7, 11]))
    assert pending == [False, True, False]


def test_rows_that_stop_are_noticed_later_and_nothing_else_changes(monkeypatch):
    decoder, tokens = tiny_decoder(), random_tokens(2, 9)
    kept = generate(decoder, tokens, max_new_tokens=24).tokens
    stop_id = int(kept[0, 2])
    expected = generate(decoder, tokens, max_new_tokens=24, stop_id=stop_id)
    one = generate(decoder, tokens[:1], max_new_tokens=24, stop_id=stop_id)
    monkeypatch.setattr(known, "values_are_known", lambda _: False)
    found = generate(decoder, tokens, max_new_tokens=24, stop_id=stop_id)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.num_tokens, expected.num_tokens)
    assert_same_state(found.state, expected.state)
    alone = generate(decoder, tokens[:1], max_new_tokens=24, stop_id=stop_id)
    assert torch.equal(alone.tokens, one.tokens)
    assert alone.tokens.shape[1] <= 3
    assert_same_state(alone.state, one.state)


def test_what_a_device_cannot_be_asked_it_checks_itself(values_unknown):
    decoder, tokens = tiny_decoder(), random_tokens(2, SEGMENT)
    state = decoder.new_state(2)
    with pytest.raises(RuntimeError, match="num_tokens must be between 0 and the columns"):
        decoder(tokens, state=state, num_tokens=torch.tensor([8, 7]))
    out = decoder(tokens[:, :5], state=state)
    state = state.commit(out.new_entries)
    with pytest.raises(RuntimeError, match="must fit into the segment"):
        decoder(tokens, state=state)
    with pytest.raises(RuntimeError, match="every row must begin a segment"):
        state.at_segment_start()
    with pytest.raises(RuntimeError, match="new entries must continue what the rows have read"):
        state.commit(out.new_entries)


def test_rows_inside_a_segment_are_not_said_to_begin_one():
    decoder, tokens = tiny_decoder(), random_tokens(2, SEGMENT)
    state = read_tokens(decoder, tokens[:, :5], decoder.new_state(2)).state
    with pytest.raises(ValueError, match=r"got rows with \[5, 5\] tokens of an unfinished one"):
        state.at_segment_start()
    with pytest.raises(ValueError, match=r"got rows with \[0, 5\] tokens"):
        state.at_segment_start(torch.tensor([True, False]))
    started = torch.tensor([True, True])
    out = decoder(tokens, state=state.at_segment_start(started), document_start=started)
    # to commit to the state that it was made from is as good
    assert state.commit(out.new_entries).position.tolist() == [SEGMENT, SEGMENT]
