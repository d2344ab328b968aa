"""One-shot = streamed in any pieces = batched with strangers = saved and reloaded."""

import math

import pytest
import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.models.generate import SamplingConfig, choose, generate
from byheart.models.streaming import read_tokens
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

LENGTH = 59


def knn(**options):
    return KnnMemoryConfig(**{"layers": (1,), "memory_size": 41, "top_k": 5, **options})


VARIANTS = {
    "paper": tiny_config(),
    "no memory": tiny_config(memory_size=0),
    "no xl cache": tiny_config(xl_cache_length=0),
    "long xl cache": tiny_config(xl_cache_length=13),
    "short xl cache": tiny_config(xl_cache_length=3),
    "wide window": tiny_config(window_length=11),
    "joint": tiny_config(memory=knn(combine="joint")),
    "content gate": tiny_config(memory=knn(combine="content_gate")),
    "evicted": tiny_config(memory=knn(write="evicted"), xl_cache_length=9),
    "evicted, short cache": tiny_config(memory=knn(write="evicted"), xl_cache_length=5),
    "self visible": tiny_config(self_visible=True),
    "both layers": tiny_config(memory=knn(layers=(0, 1))),
    "authors' empty slots": tiny_config(empty_slots="zeros"),
    "no q/k norm": tiny_config(normalize_qk=False, position_bias="none"),
    "strided buckets": tiny_config(
        memory=knn(search="strided_bucket", memory_size=40, num_buckets=10)
    ),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def decoder(request):
    return tiny_decoder(request.param)


@pytest.fixture
def tokens():
    return random_tokens(3, LENGTH)


def one_shot(decoder, tokens):
    return read_tokens(
        decoder, tokens, decoder.new_state(tokens.shape[0]), return_logits=True
    ).logits


def test_any_pieces_equal_one_shot(decoder, tokens):
    state, pieces, start = decoder.new_state(3), [], 0
    for length in (1, 3, 7, 2, 11, 29, 6):
        read = read_tokens(decoder, tokens[:, start : start + length], state, return_logits=True)
        state, start = read.state, start + length
        pieces.append(read.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), one_shot(decoder, tokens))


def test_rows_that_read_at_different_speeds_equal_one_shot(decoder, tokens):
    generator = torch.Generator().manual_seed(5)
    state, done = decoder.new_state(3), torch.zeros(3, dtype=torch.long)
    got = torch.zeros(3, LENGTH, 31)
    while bool((done < LENGTH).any()):
        take = torch.minimum(torch.randint(0, 9, (3,), generator=generator), LENGTH - done)
        columns = torch.arange(max(1, int(take.max())))
        piece = tokens.gather(1, (done[:, None] + columns).clamp(max=LENGTH - 1))
        read = read_tokens(decoder, piece, state, num_tokens=take, return_logits=True)
        state = read.state
        for row in range(3):
            got[row, done[row] : done[row] + take[row]] = read.logits[row, : take[row]]
        done = done + take
    torch.testing.assert_close(got, one_shot(decoder, tokens))


def test_a_bfloat16_memory_is_close_to_a_float32_one(tokens):
    decoder = tiny_decoder()
    rounded = tiny_decoder(tiny_config(memory=knn(dtype="bfloat16")))
    rounded.load_state_dict(decoder.state_dict())
    exact, close = one_shot(decoder, tokens), one_shot(rounded, tokens)
    assert not torch.equal(exact, close)
    # entries are off by 2^-9 of themselves, and equal scores may pick another neighbour
    assert (exact - close).abs().mean() < 0.01 * exact.abs().mean()


def test_a_row_equals_itself_alone(decoder, tokens):
    alone = torch.cat([one_shot(decoder, tokens[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(alone, one_shot(decoder, tokens))


def test_a_new_document_equals_a_fresh_state(decoder, tokens):
    first = read_tokens(decoder, tokens, decoder.new_state(3)).state
    starts = torch.tensor([True, False, True])
    second = random_tokens(3, LENGTH, seed=2)
    read = read_tokens(decoder, second, first, document_start=starts, return_logits=True)
    fresh = one_shot(decoder, second)
    torch.testing.assert_close(read.logits[starts], fresh[starts])
    assert not torch.allclose(read.logits[1], fresh[1])


def test_saved_and_reloaded_equals_uninterrupted(decoder, tokens, tmp_path):
    # 24 tokens: three complete segments and three pending tokens
    state = read_tokens(decoder, tokens[:, :24], decoder.new_state(3)).state
    decoder.save_state(state, tmp_path / "state")
    loaded = decoder.load_state(tmp_path / "state")
    went_on = read_tokens(decoder, tokens[:, 24:], state, return_logits=True).logits
    reloaded = read_tokens(decoder, tokens[:, 24:], loaded, return_logits=True).logits
    assert torch.equal(went_on, reloaded)


def test_a_fork_goes_its_own_way(decoder, tokens):
    state = read_tokens(decoder, tokens[:, :24], decoder.new_state(3)).state
    fork = state.fork()
    read_tokens(decoder, random_tokens(3, LENGTH, seed=9), fork)
    rest = read_tokens(decoder, tokens[:, 24:], state, return_logits=True).logits
    torch.testing.assert_close(rest, one_shot(decoder, tokens)[:, 24:])


def test_decoding_step_by_step_equals_segment_evaluation(decoder, tokens):
    prompt = tokens[:, :10]
    new = generate(decoder, prompt, max_new_tokens=30).tokens
    logits = one_shot(decoder, torch.cat([prompt, new], dim=1))
    assert torch.equal(new, logits[:, 9:-1].argmax(-1))


def test_generation_can_be_continued(decoder, tokens):
    whole = generate(decoder, tokens[:, :10], max_new_tokens=20).tokens
    first = generate(decoder, tokens[:, :10], max_new_tokens=9)
    second = generate(decoder, first.tokens[:, -1:], max_new_tokens=11, state=first.state)
    assert torch.equal(torch.cat([first.tokens, second.tokens], dim=1), whole)


def test_prompts_of_different_length_equal_each_alone(decoder, tokens):
    lengths = torch.tensor([4, 23, 11])
    sampled = generate(decoder, tokens[:, :23], num_tokens=lengths, max_new_tokens=13).tokens
    for row, length in enumerate(lengths.tolist()):
        alone = generate(decoder, tokens[row : row + 1, :length], max_new_tokens=13).tokens
        assert torch.equal(alone[0], sampled[row])


def test_a_row_stops_alone(tokens):
    decoder = tiny_decoder()
    free = generate(decoder, tokens[:, :10], max_new_tokens=15)
    stop = int(free.tokens[0, 4])
    stopped = generate(decoder, tokens[:, :10], max_new_tokens=15, stop_id=stop)
    for row in range(3):
        hits = (free.tokens[row] == stop).nonzero()
        length = int(hits[0]) + 1 if len(hits) else 15
        assert stopped.num_tokens[row] == length
        assert torch.equal(stopped.tokens[row, :length], free.tokens[row, :length])


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    for sampling, expected in (
        (SamplingConfig(), [0.0900, 0.2447, 0.6652, 0.0]),
        (SamplingConfig(temperature=0.5), [0.0159, 0.1173, 0.8668, 0.0]),
        (SamplingConfig(top_k=2), [0.0, 0.2689, 0.7311, 0.0]),
        (SamplingConfig(top_p=0.7), [0.0, 0.2689, 0.7311, 0.0]),
        (SamplingConfig(top_p=0.6), [0.0, 0.0, 1.0, 0.0]),
        (SamplingConfig(temperature=0.0), [0.0, 0.0, 1.0, 0.0]),
    ):
        share = torch.bincount(choose(logits, sampling, generator), minlength=4) / 4000
        # five standard deviations of a share of 4000 draws
        torch.testing.assert_close(share, torch.tensor(expected), atol=0.04, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(temperature, score):
    sampling = SamplingConfig(temperature=temperature)
    forbidden = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert choose(forbidden, sampling).tolist() == [0, 1]
    forbidden[1, 0] = score
    with pytest.raises(ValueError, match="scores of the next token must be numbers, got NaN or"):
        choose(forbidden, sampling)


def test_generation_refuses_bad_requests(tokens):
    decoder = tiny_decoder()
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(decoder, tokens, max_new_tokens=0)
    with pytest.raises(ValueError, match="at least one prompt token"):
        generate(decoder, tokens, max_new_tokens=1, num_tokens=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got -1\.0"):
        SamplingConfig(temperature=-1.0)
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got 0"):
        SamplingConfig(top_p=0.0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        SamplingConfig(top_k=0)
