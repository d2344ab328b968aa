import pytest
import torch
from torch.nn.functional import cross_entropy

from byheart.data.probes import Probe, ProbeConfig
from byheart.data.tokenize import ByteTokenizer
from byheart.evaluation.probes import evaluate_probe


@pytest.fixture
def probe(tmp_path):
    path = tmp_path / "background.txt"
    path.write_text(" ".join(f"word{i}" for i in range(60)))
    config = ProbeConfig(name="passkey", background=str(path))
    return Probe(config, ByteTokenizer())


@torch.no_grad()
def outcome(model, sample, memory_size, *, checks_alone):
    """What becomes of a text, by reading it with each of its answers in one go."""
    text = sample.text.tokens(0, sample.text.num_tokens)
    # keys have equally many digits, so that their texts can be rows of a batch
    answers = torch.stack([torch.as_tensor(answer) for answer in sample.candidates])
    ids = torch.cat([torch.as_tensor(text).expand(len(answers), -1), answers], dim=1).long()
    losses, hits, state = [], [], model.new_state(len(ids), memory_size=memory_size)
    for piece, following in zip(ids[:, :-1].split(7, 1), ids[:, 1:].split(7, 1), strict=True):
        out = model(piece, state=state)
        losses.append(cross_entropy(out.logits.mT, following, reduction="none"))
        hits.append(out.logits.argmax(-1) == following)
        state = state.commit(out.new_entries)
    means = -torch.cat(losses, 1)[:, -answers.shape[1] :].mean(1)
    greedy = torch.cat(hits, 1)[sample.answer, -answers.shape[1] :].all()
    if checks_alone:
        one, alone = model.new_state(1, memory_size=memory_size), []
        for piece, following in zip(ids[:1, :-1].split(7, 1), ids[:1, 1:].split(7, 1), strict=True):
            out = model(piece, state=one)
            alone.append(cross_entropy(out.logits.mT, following, reduction="none"))
            one = one.commit(out.new_entries)
        mean = -torch.cat(alone, 1)[0, -answers.shape[1] :].mean()
        torch.testing.assert_close(mean, means[0], atol=1e-4, rtol=1e-5)
    return int(means.argmax()) == sample.answer, bool(greedy)


def test_outcomes_are_those_of_reading_each_answer_in_one_go(reader, probe):
    model = reader.train()
    seen = []
    result = evaluate_probe(
        model, probe, lengths=(98, 130), memory_sizes=(0, 17), samples=5, rows=2,
        on_progress=seen.append,
    )  # fmt: skip
    assert model.training
    assert [(m.num_tokens, m.memory_size) for m in result.measurements] == [
        (98, 0), (98, 17), (130, 0), (130, 17),
    ]  # fmt: skip
    model.eval()
    for measured in result.measurements:
        for index, found in enumerate(measured.outcomes):
            sample = probe.sample(index, measured.num_tokens)
            is_right, is_greedy = outcome(
                model, sample, measured.memory_size, checks_alone=index == 0
            )
            assert (found.is_right, found.is_greedy) == (is_right, is_greedy)
            text = sample.text.text()
            after = text.rpartition("is the pass key.")[2]
            assert found.distance == len(after)
    assert [now.num_tokens for now in seen[-2:]] == [(98 + 130) * 10 - 130, (98 + 130) * 10]
    assert seen[-1].total_tokens == seen[-1].num_tokens


def test_a_result_counts_and_says_what_chance_is(make_decoder, probe):
    result = evaluate_probe(make_decoder(), probe, lengths=(150,), samples=12)
    (measured,) = result.measurements
    rights = [found.is_right for found in measured.outcomes]
    assert measured.memory_size == 17
    assert measured.accuracy == sum(rights) / 12
    plain = result.to_dict()
    assert plain["chance"] == 0.1
    assert plain["measurements"][0]["accuracy"] == measured.accuracy
    assert plain["measurements"][0]["outcomes"][0].keys() == {"distance", "is_right", "is_greedy"}
    table = result.to_markdown()
    assert "Accuracy of passkey (12 texts each, chance 10.0%)" in table
    assert f"| 150 | 17 | {measured.accuracy:.1%} | {measured.greedy_accuracy:.1%} |" in table


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"rows": 0}, {"lengths": ()}])
def test_numbers_below_one_are_refused(make_decoder, probe, wrong):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        evaluate_probe(make_decoder(), probe, **({"lengths": (100,)} | wrong))


def test_a_length_too_short_is_refused_before_anything_is_read(make_decoder, probe):
    seen = []
    with pytest.raises(ValueError, match=r"num_tokens must be at least 98 .* got 50"):
        evaluate_probe(make_decoder(), probe, lengths=(200, 50), samples=2, on_progress=seen.append)
    assert not seen


def test_a_background_that_repeats_is_said_with_its_tokens(make_decoder, probe, caplog):
    tokens = probe.num_background_tokens
    facts = 98  # and question, of which the start token is a part
    evaluate_probe(make_decoder(), probe, lengths=(tokens,), samples=1)
    assert not caplog.text
    evaluate_probe(make_decoder(), probe, lengths=(98, tokens + facts + 1), samples=1)
    assert f"repeats within a text: it has {tokens:,} tokens" in caplog.text
    assert f"texts of {tokens + 99:,} tokens" in caplog.text
