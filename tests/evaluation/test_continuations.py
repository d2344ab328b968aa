import itertools

import numpy as np
import pytest
import torch

from byheart.evaluation.continuations import score_continuations, score_tokens
from byheart.models.generate import generate

ALONE = 2e-4


class Text:
    def __init__(self, ids):
        self.ids = np.array(ids, dtype=np.int32)
        self.num_tokens = len(ids)
        self.longest = 0

    def tokens(self, start, stop):
        self.longest = max(self.longest, stop - start)
        return self.ids[start:stop]


def one_by_one(model, ids, num_scored, memory_size=None):
    """Sum of the losses of the last tokens, read token by token."""
    state = model.new_state(1, memory_size=memory_size)
    total, greedy = 0.0, True
    for place, (token, following) in enumerate(itertools.pairwise(ids)):
        out = model(torch.tensor([[token]]), state=state)
        state = state.commit(out.new_entries)
        if place >= len(ids) - 1 - num_scored:
            total += float(out.logits[0, 0].double().log_softmax(-1)[following])
            greedy &= int(out.logits[0, 0].argmax()) == following
    return total, greedy


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(7)
    return lambda length: torch.randint(257, (length,), generator=generator).tolist()


@pytest.mark.parametrize("memory_size", [None, 0, 5])
@torch.no_grad()
def test_scores_equal_those_of_reading_token_by_token(make_decoder, ids, memory_size):
    model = make_decoder()
    contexts = [ids(length) for length in (1, 30, 7, 8, 44)]
    # of different numbers and lengths, some longer than a segment of 7
    continuations = [[ids(3), ids(16)], [ids(1)], [], [ids(2), ids(7), ids(1)], [ids(9)]]
    scores = score_continuations(
        model, [Text(context) for context in contexts], continuations, memory_size=memory_size
    )
    assert [len(row) for row in scores] == [2, 1, 0, 3, 1]
    for context, row, answers in zip(contexts, scores, continuations, strict=True):
        for score, answer in zip(row, answers, strict=True):
            expected, greedy = one_by_one(model, context + answer, len(answer), memory_size)
            assert score.log_likelihood == pytest.approx(expected, abs=ALONE * len(answer))
            assert score.is_greedy == greedy


def test_what_the_model_itself_would_say_is_greedy(make_decoder, ids):
    model = make_decoder()
    context = ids(25)
    own = generate(model, torch.tensor([context]), max_new_tokens=12).tokens[0].tolist()
    changed = [*own[:11], (own[11] + 1) % 257]
    scores = score_continuations(model, [Text(context)], [[own, changed, own[:1]]])[0]
    assert [score.is_greedy for score in scores] == [True, False, True]
    assert scores[0].log_likelihood > scores[1].log_likelihood


def test_memory_changes_the_scores(make_decoder, ids):
    model, context, answer = make_decoder(), ids(60), ids(4)
    found = [
        score_continuations(model, [Text(context)], [[answer]], memory_size=size)[0][0]
        for size in (0, 17)
    ]
    assert abs(found[0].log_likelihood - found[1].log_likelihood) > 1e-3


def test_no_more_than_a_segment_is_held_at_a_time(make_decoder, ids, monkeypatch):
    model, text = make_decoder(), Text(ids(100))
    score_continuations(model, [text], [[ids(2)]])
    assert text.longest <= model.memory_layout.segment_length
    # also where a single token's scores are more than what shall be held
    long = ids(23)
    whole = score_tokens(model, [long], model.new_state(1))
    monkeypatch.setattr("byheart.evaluation.continuations._MAX_SCORES", 600)
    pieces = score_tokens(model, [long], model.new_state(1))
    assert pieces.scores[0].log_likelihood == pytest.approx(
        whole.scores[0].log_likelihood, abs=ALONE
    )
    assert int(pieces.state.position[0]) == int(whole.state.position[0]) == 22


def test_empty_texts_and_continuations_are_refused(make_decoder):
    model = make_decoder()
    with pytest.raises(ValueError, match="context must have at least one token"):
        score_continuations(model, [Text([])], [[[1]]])
    with pytest.raises(ValueError, match="continuation must have at least one token"):
        score_continuations(model, [Text([1])], [[[1], []]])
