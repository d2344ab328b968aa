"""The report's token arithmetic, against the steps of its code written out."""

import re

import numpy as np
import pytest

from byheart.data.tasks import Task, TaskConfig, collate, pad_questions, read_stories
from byheart.data.tasks.facts import people_stories, relation_stories

CLS, SEP, PAD = -1, -2, -3
SHORT = {
    "facts": ["The office is north of the kitchen.", "The garden is south of the kitchen."],
    "question": "What is north of the kitchen?",
    "answer": "office",
}
LONG = SHORT | {"question": "What is very very very north of the kitchen?"}


def report_tensor(words, text, question, width, num_question_columns):
    """`[CLS] text ... question [SEP] [PAD] ...`, as the report feeds a row to its model."""
    background = [CLS, *words.encode(text)[: width - 2].tolist(), SEP]
    columns = [*words.encode(question).tolist(), SEP]
    columns += [PAD] * (num_question_columns - len(columns))
    return [*background[: width - len(columns)], *columns]


def content(tensor):
    return [token for token in tensor if token >= 0]


@pytest.fixture
def make(words, write_lines, article):
    def make(name, segment_length=499, **settings):
        background = write_lines({"text": article}, name="background.jsonl")
        config = TaskConfig(
            name=name,
            form="report",
            segment_length=segment_length,
            background=background,
            **settings,
        )
        return Task(config, words, split="train")

    return make


@pytest.mark.parametrize("num_segments", [1, 3])
def test_memorize_equals_the_steps_of_the_report(make, words, num_segments, article):
    sample = make("memorize").sample(4, num_segments)
    (fact,) = re.findall(r"^\w+ [\w ]+ to the \w+ ?\.", sample.text())
    question = re.search(r"Where is \w+ ?\?$", sample.text())[0]
    text = fact + article * 60 * num_segments
    width = 499 * num_segments
    tensor = report_tensor(words, text, question, width, len(words.encode(question)) + 1)
    assert len(tensor) == width
    assert sample.tokens(0, sample.num_tokens).tolist() == content(tensor)
    assert sample.num_tokens == 499 * num_segments - 2
    assert sample.fact_positions == (0,)


def test_detect_overwrites_the_start_of_a_random_segment(make, words, article):
    task, seen = make("detect"), set()
    for index in range(30):
        sample = task.sample(index, 4)
        (position,) = sample.fact_positions
        segment, rest = divmod(position, 499)
        assert rest == 0
        seen.add(segment)
        fact = sample.facts[0][1]
        tensor = report_tensor(words, article * 200, "Where is Mary?", 4 * 499, 5)
        tensor[segment * 499 + 1 : segment * 499 + 1 + len(fact)] = fact.tolist()
        expected = content(tensor)
        expected[-4:] = sample.question.tolist()
        assert sample.tokens(0, sample.num_tokens).tolist() == expected
        # segments are cut from the end, the first is the short one: 497 tokens
        boundaries = [0, *(sample.num_tokens - 499 * k for k in (3, 2, 1))]
        assert boundaries[1] == 497
        assert position - boundaries[segment] == (0 if segment == 0 else 2)
    assert seen == {0, 1, 2, 3}


def test_facts_in_the_same_segment_follow_each_other(make, words):
    task, kinds = make("reason", segment_length=60), set()
    for index in range(60):
        sample = task.sample(index, 3)
        first, second = sample.fact_positions
        assert first % 60 == 0
        length = len(sample.facts[0][1])
        kinds.add("same" if second == first + length else "later" if second > first else "earlier")
        assert second in (first + length, 0, 60, 120)
        assert second != first
        for position, fact in sample.facts:
            piece = sample.tokens(position, position + len(fact))
            np.testing.assert_array_equal(piece, fact)
    assert kinds == {"same", "later", "earlier"}
    # at one segment both stand at the start
    assert task.sample(0, 1).fact_positions == (0, length)


def test_a_shorter_question_of_a_batch_costs_background(make, words, write_lines, article):
    """Content has 499 N - 2 - pad tokens, and a fact of a later segment stands at 2 + pad."""
    task = make("reason", facts=write_lines(SHORT, LONG))
    samples = [task.sample(index, 3) for index in range(12)]
    lengths = {sample.question_length for sample in samples}
    assert lengths == {7, 10}
    assert {sample.num_tokens for sample in samples} == {3 * 499 - 2}
    for alone, sample in zip(samples, pad_questions(samples), strict=True):
        padding = 10 - sample.question_length
        assert sample.num_tokens == 3 * 499 - 2 - padding
        assert sample.num_tokens - 2 * 499 == 497 - padding
        question = words.decode(sample.question)
        tensor = report_tensor(words, article * 200, question, 3 * 499, 10 + 1)
        for position, fact in sample.facts:
            tensor[position + 1 : position + 1 + len(fact)] = fact.tolist()
        assert sample.tokens(0, sample.num_tokens).tolist() == content(tensor)
        assert sample.fact_positions == alone.fact_positions
        segment, rest = divmod(sample.fact_positions[0], 499)
        start = sample.num_tokens - 499 * (3 - segment) if segment else 0
        assert (rest, sample.fact_positions[0] - start) == (0, 2 + padding if segment else 0)
    batch = collate(samples)
    assert batch["attention_mask"].sum(1).tolist() == [s.num_tokens for s in pad_questions(samples)]


def test_training_and_evaluation_share_facts_but_no_background(words):
    facts, articles = {}, {}
    for split in ("train", "validation"):
        config = TaskConfig(name="detect", form="report", segment_length=40)
        task = Task(config, words, split=split)
        samples = [task.sample(index, 1) for index in range(1000)]
        articles[split] = set(task._background._texts)
        facts[split] = {tuple(sample.facts[0][1].tolist()) for sample in samples}
    assert not articles["train"] & articles["validation"]
    assert facts["train"] == facts["validation"]
    assert len(facts["train"]) == len(people_stories(None))


def test_reason_draws_from_all_stories_or_from_the_rows_of_the_file(make, write_lines):
    assert make("reason").labels == (
        "bedroom",
        "bathroom",
        "garden",
        "kitchen",
        "office",
        "hallway",
    )
    assert len(make("reason")._stories) == len(relation_stories(None))
    path = write_lines(SHORT, SHORT, LONG | {"answer": "hall"})
    task = make("reason", facts=path)
    # repeated rows weigh more, and labels are in the order of their first appearance
    assert task._stories == read_stories(path)
    assert task.labels == ("office", "hall")
    labels = [task.sample(index, 1).label for index in range(300)]
    assert labels.count(0) == pytest.approx(200, abs=35)


def test_documents_take_the_articles_in_turn(words, write_lines):
    path = write_lines(*({"text": f"w{i} " * 9} for i in range(3)))
    config = TaskConfig(name="memorize", form="report", segment_length=40, background=path)
    task = Task(config, words, split="validation")
    for index in range(6):
        assert f"w{index % 3} " in task.sample(index, 2).text()


def test_a_segment_must_hold_facts_question_and_specials(make):
    # "Mary went back to the garden." has 7 tokens, "Where is Mary?" 4, [CLS] and [SEP] 2
    with pytest.raises(ValueError, match=r"segment_length must be at least 13 to hold .* got 12"):
        make("detect", segment_length=12)
    assert make("detect", segment_length=13).sample(0, 1).num_tokens == 11
