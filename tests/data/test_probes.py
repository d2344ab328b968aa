import json

import numpy as np
import pytest

from byheart.config import from_dict
from byheart.data.probes import Probe, ProbeConfig
from byheart.data.tokenize import BpeTokenizer, ByteTokenizer
from byheart.errors import DataError

STORIES = [
    {"facts": ["Mary is here.", "Mary left."], "question": "Where is Mary?", "answer": "there"},
    {"facts": ["John is up."], "question": "Where is John?", "answer": "up"},
]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("\n".join(map(json.dumps, STORIES)))
    return str(path)


@pytest.fixture
def background(tmp_path):
    # words that occur in no fact, each once, so that repetitions show
    path = tmp_path / "background.txt"
    path.write_text(" ".join(f"q{i:04d}z" for i in range(600)))
    return str(path)


def decoded(probe, index, num_tokens):
    sample = probe.sample(index, num_tokens)
    assert len(sample.text.tokens(0, num_tokens)) == num_tokens
    answers = [ByteTokenizer().decode(ids) for ids in sample.candidates]
    return sample, sample.text.text(), answers


@pytest.mark.parametrize("num_tokens", [120, 999])
def test_the_passkey_stands_in_the_text_and_the_others_do_not(background, num_tokens):
    probe = Probe(ProbeConfig(name="passkey", background=background), ByteTokenizer())
    places = set()
    for index in range(20):
        sample, text, answers = decoded(probe, index, num_tokens)
        assert len(set(answers)) == 10
        assert all(len(answer) == 6 for answer in answers)
        assert text.endswith(" What is the pass key? The pass key is")
        key = answers[sample.answer]
        fact = f" The pass key is{key}. Remember it.{key} is the pass key."
        (place,) = sample.text.fact_positions
        assert text[place - 1 :].startswith(fact)  # the start token leaves no trace in the text
        assert not any(other in text for other in answers if other != key)
        assert sample.text.tokens(0, 1).tolist() == [256]
        places.add(place)
    assert len(places) > 10


def test_each_person_has_one_number_and_one_is_asked_for(background):
    probe = Probe(ProbeConfig(name="multi-key", num_keys=5, background=background), ByteTokenizer())
    asked_first = 0
    for index in range(20):
        sample, text, answers = decoded(probe, index, 800)
        assert len(set(answers)) == 5
        told = {}
        for sentence in text.split(" The number of ")[1:-1]:
            name, _, number = sentence.partition(" is ")
            assert name not in told
            told[name] = number[:5]
        assert set(told.values()) == {answer.strip() for answer in answers}
        asked = text.rpartition("The number of ")[2].removesuffix(" is")
        assert told[asked] == answers[sample.answer].strip()
        asked_first += next(iter(told)) == asked
    assert 0 < asked_first < 20


def test_facts_of_a_story_keep_their_order(stories, background):
    probe = Probe(ProbeConfig(name="babi", stories=stories, background=background), ByteTokenizer())
    seen = set()
    for index in range(20):
        sample, text, answers = decoded(probe, index, 150)
        assert answers == [" there", " up"]
        record = STORIES[sample.answer]
        assert text.endswith(f" {record['question']} Answer:")
        places = [text.index(f" {fact}") for fact in record["facts"]]
        assert places == sorted(places)
        assert list(sample.text.fact_positions) == sorted(sample.text.fact_positions)
        seen.add(sample.answer)
    assert seen == {0, 1}


def test_a_sample_depends_on_seed_index_and_length_alone(background):
    config = ProbeConfig(name="passkey", background=background)
    one, same, other = (Probe(config, ByteTokenizer(), seed=seed) for seed in (3, 3, 4))

    def tokens(probe, index):
        return probe.sample(index, 400).text.tokens(0, 400)

    assert np.array_equal(tokens(one, 2), tokens(same, 2))
    assert not np.array_equal(tokens(one, 2), tokens(one, 1))
    assert not np.array_equal(tokens(one, 2), tokens(other, 2))


def test_no_text_around_comes_twice(background):
    probe = Probe(ProbeConfig(name="passkey", background=background), ByteTokenizer())
    words = [word for word in probe.sample(0, 3000).text.text().split() if word.startswith("q")]
    whole = [word for word in words if len(word) == 6]
    assert len(whole) > 350
    assert len(set(whole)) == len(whole)


def test_a_tokenizer_without_a_start_token_and_the_stories_of_byheart(tmp_path):
    BpeTokenizer.train(["some words " * 30], 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start|>", "<|other|>"))
    tokenizer = BpeTokenizer.from_file(file)
    assert tokenizer.start_id is None
    sample = Probe(ProbeConfig(name="passkey"), tokenizer).sample(0, 700)
    assert "The pass key is" in sample.text.text()
    assert sample.text.num_tokens == 700


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"name": "pass-key"},
            "name must be one of 'passkey', 'multi-key', 'babi', got 'pass-key'",
        ),
        ({"name": "multi-key", "num_keys": 1}, "num_keys must be between 2 and 130, got 1"),
        ({"name": "multi-key", "num_keys": 131}, "num_keys must be between 2 and 130, got 131"),
        ({"name": "babi"}, "stories must be a file of stories for name='babi', got None"),
        ({"name": "passkey", "stories": "x"}, "stories must be None for name='passkey', got 'x'"),
    ],
)
def test_what_no_probe_can_be_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        from_dict(ProbeConfig, settings)


def test_a_text_too_short_and_stories_with_one_answer_are_refused(background, tmp_path):
    probe = Probe(ProbeConfig(name="passkey", background=background), ByteTokenizer())
    with pytest.raises(ValueError, match=r"num_tokens must be at least 98 to hold .*, got 97"):
        probe.sample(0, 97)
    assert probe.sample(0, 98).text.fact_positions == (1,)
    with pytest.raises(ValueError, match="index must be at least 0, got -1"):
        probe.sample(-1, 200)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Probe(probe.config, ByteTokenizer(), seed=-1)
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(STORIES[0]))
    config = ProbeConfig(name="babi", stories=str(path), background=background)
    with pytest.raises(DataError, match="two answers or more, got 'there' alone"):
        Probe(config, ByteTokenizer())
