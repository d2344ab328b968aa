import json
import lzma
import re
from collections import Counter

import numpy as np
import pytest

from byheart.data.tasks import Story, read_stories
from byheart.data.tasks.facts import (
    KEYS,
    NAMES,
    RELATION_ROOMS,
    ROOMS,
    VERBS,
    draw_people,
    is_direct,
    is_hard,
    people_stories,
    relation_stories,
)
from byheart.data.tasks.stories_file import split_stories
from byheart.errors import DataError

TWO = {"facts": ["A is north of B.", "B is north of C."], "question": "What is?", "answer": "A"}


def words(sentence):
    return set(re.findall(r"\w+", sentence))


def answers(stories):
    return set(Counter(story.answer for story in stories).values())


def test_people_facts_are_the_120_of_the_report():
    facts = [story.facts[0] for story in people_stories(None)]
    assert len(set(facts)) == len(facts) == 4 * 5 * 6
    assert "Sandra went back to the kitchen." in facts
    assert people_stories(None)[0] == Story(
        facts=("Mary moved to the bathroom.",), question="Where is Mary?", answer="bathroom"
    )
    assert KEYS[:4] == NAMES
    assert len(set(KEYS)) == len(KEYS) >= 2 * 64


def test_held_out_people_facts_are_new_but_their_pairs_of_words_are_not():
    train, held_out = people_stories("train"), people_stories("validation")
    assert (len(train), len(held_out)) == (96, 24)
    assert not {story.facts for story in train} & {story.facts for story in held_out}

    def pairs(stories):
        parts = [re.split(r" (.+) to the (\w+)\.", story.facts[0])[:3] for story in stories]
        return {pair for n, v, r in parts for pair in ((n, v), (n, r), (v, r))}

    assert pairs(held_out) <= pairs(train)
    assert len(pairs(train)) == 4 * 5 + 4 * 6 + 5 * 6
    assert {(n, v) for n in NAMES for v in VERBS} <= pairs(train)
    assert answers(train) == {16}
    assert answers(held_out) == {4}


def test_relation_stories_are_those_of_babi():
    stories = relation_stories(None)
    # 6 * 5 * 4 layouts on 2 axes, 2 wordings of each fact, 2 orders, 2 facts, 2 wordings to ask
    assert len(set(stories)) == len(stories) == 120 * 2 * 4 * 2 * 2 * 2
    templates = Counter(re.sub("|".join(RELATION_ROOMS), "X", s.question) for s in stories)
    ways = ("north", "south", "west", "east")
    assert templates == {
        **{f"What is {way} of the X?": 960 for way in ways},
        **{f"What is the X {way} of?": 960 for way in ways},
    }
    assert answers(stories) == {1280}
    # from bAbI's files of task 4
    for facts, question, answer in [
        (("office is north of the kitchen", "garden is south of the kitchen"),
         "What is north of the kitchen?", "office"),
        (("kitchen is west of the garden", "hallway is west of the kitchen"),
         "What is the garden east of?", "kitchen"),
        (("office is east of the bathroom", "bathroom is east of the garden"),
         "What is the garden west of?", "bathroom"),
    ]:  # fmt: skip
        sentences = tuple(f"The {fact}." for fact in facts)
        assert Story(facts=sentences, question=question, answer=answer) in stories


def test_each_relation_question_is_answered_by_one_fact():
    back = {"north": "south", "south": "north", "west": "east", "east": "west"}
    for story in relation_stories(None):
        told = [
            re.match(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in story.facts
        ]
        direct = re.match(r"What is (\w+) of the (\w+)\?", story.question)
        if direct:
            way, other = direct.groups()
        else:
            other, opposite = re.match(r"What is the (\w+) (\w+) of\?", story.question).groups()
            way = back[opposite]
        assert [x for x, w, y in told if (w, y) == (way, other)] == [story.answer]


def test_in_hard_stories_the_direction_alone_tells_the_answer():
    back = {"north": "south", "south": "north", "west": "east", "east": "west"}
    hard = [story for story in relation_stories(None) if is_hard(story)]
    assert len(hard) == 7680 // 4
    assert answers(hard) == {7680 // 4 // 6}
    for story in hard:
        told = [re.match(r"The (\w+) is (\w+) of the (\w+)\.", f).groups() for f in story.facts]
        direct = re.match(r"What is (\w+) of the (\w+)\?", story.question)
        turned = re.match(r"What is the (\w+) (\w+) of\?", story.question)
        way, room = direct.groups() if direct else (back[turned[2]], turned[1])
        assert is_direct(story) == bool(direct)
        assert [y for _, _, y in told] == [room, room]
        assert [x for x, w, _ in told if w == way] == [story.answer]
    for story in set(relation_stories(None)) - set(hard):
        ends = [fact.split()[-1] for fact in story.facts]
        assert ends[0] != ends[1]
    assert not any(map(is_hard, people_stories(None)))


def test_held_out_relation_layouts_never_occur_in_training():
    train, held_out = relation_stories("train"), relation_stories("validation")
    assert (len(train), len(held_out)) == (6912, 768)
    assert answers(train) == {6912 // 6}
    assert answers(held_out) == {768 // 6}

    def layout(story):
        order = [re.match(r"The (\w+) is (\w+) of the (\w+)\.", f).groups() for f in story.facts]
        return frozenset(
            (x, w, y) if w in ("north", "east") else (y, back[w], x) for x, w, y in order
        )

    back = {"south": "north", "west": "east"}
    assert len({layout(story) for story in held_out}) == 24
    assert not {layout(story) for story in train} & {layout(story) for story in held_out}
    # while every sentence does
    sentences = {fact for story in train for fact in story.facts}
    assert {fact for story in held_out for fact in story.facts} <= sentences
    assert len(sentences) == 6 * 5 * 4
    questions = {story.question for story in train}
    assert {story.question for story in held_out} <= questions


@pytest.mark.parametrize("num_facts", [1, 7, 64])
def test_capacity_facts_tell_different_persons_apart(num_facts):
    rng = np.random.default_rng(0)
    seen = {"train": set(), "validation": set()}
    for split, sentences in seen.items():
        for _ in range(200):
            story = draw_people(rng, num_facts, split)
            assert len({fact.split()[0] for fact in story.facts}) == num_facts
            person = re.match(r"Where is (\w+)\?", story.question)[1]
            assert story.facts[0].startswith(f"{person} ")
            assert story.facts[0].endswith(f" {story.answer}.")
            sentences.update(story.facts)
    assert not seen["train"] & seen["validation"]
    rooms = {room for room in ROOMS for fact in seen["train"] if room in fact}
    assert rooms == set(ROOMS)


def test_stories_are_read_in_the_order_of_the_file(write_lines):
    other = TWO | {"question": "And what?", "answer": "B", "id": "qa4/1", "support": [1]}
    path = write_lines(TWO, "", other, TWO)
    assert [story.answer for story in read_stories(path)] == ["A", "B", "A"]
    assert read_stories(path)[0].facts == tuple(TWO["facts"])


def test_stories_with_the_same_facts_are_held_out_together(write_lines):
    records = [
        {"facts": [f"A is {i}.", f"B is {i}."][::way], "question": q, "answer": f"a{i % 3}"}
        for i in range(40) for way in (1, -1) for q in ("What is A?", "What is B?", "What is A?")
    ]  # fmt: skip
    stories = read_stories(write_lines(*records))
    train, held_out = split_stories(stories, "train"), split_stories(stories, "validation")
    assert (len(train), len(held_out)) == (36 * 4, 4 * 4)
    assert set(train) | set(held_out) == set(stories)
    assert not {frozenset(s.facts) for s in train} & {frozenset(s.facts) for s in held_out}
    # the split does not depend on the order of the file
    assert set(split_stories(stories[::-1], "validation")) == set(held_out)


def test_an_answer_that_training_would_not_see_is_refused(write_lines):
    stories = read_stories(write_lines(TWO))
    with pytest.raises(DataError, match=r"must occur in the training split, \['A'\] do not with 1"):
        split_stories(stories, "train")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "must be a JSON record: "),
        ("[1]", "must be a JSON object, got list"),
        (
            json.dumps(TWO | {"facts": ["one"]}),
            r"must have 2 facts, got \['one'",
        ),
        (json.dumps(TWO | {"facts": ["one", " "]}), "must have sentences under 'facts'"),
        (json.dumps(TWO | {"facts": []}), r"must have sentences under 'facts', got \[\]"),
        (json.dumps(TWO | {"question": ""}), "must have a text under 'question', got ''"),
        (json.dumps(TWO | {"answer": 3}), "must have a text under 'answer', got 3"),
    ],
)
def test_a_malformed_line_is_named(write_lines, line, problem):
    path = write_lines(TWO, "", line)
    with pytest.raises(DataError, match=rf"lines\.jsonl:3 {problem}"):
        read_stories(path, num_facts=2)


BABI = """1 Mary went to the hall.
2 John is here.
3 Where is Mary?\thall\t1
4 Mary went home.
5 Where is Mary? \thome\t4
1 The hall is old.
2 What is old?\thall\t1
"""


def test_a_file_of_babi_gives_each_question_the_facts_before_it(tmp_path):
    path = tmp_path / "qa1_train.txt"
    path.write_text(BABI)
    first, second, third = read_stories(path)
    assert first == Story(
        facts=("Mary went to the hall.", "John is here."), question="Where is Mary?", answer="hall"
    )
    assert second.facts == (*first.facts, "Mary went home.")
    assert (second.question, second.answer) == ("Where is Mary?", "home")
    assert third.facts == ("The hall is old.",)
    packed = tmp_path / "qa1_train.txt.xz"
    packed.write_bytes(lzma.compress(BABI.encode()))
    assert read_stories(packed) == [first, second, third]
    with pytest.raises(DataError, match=r"qa1_train\.txt:5 must have 2 facts, got \['Mary"):
        read_stories(path, num_facts=2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"Mary went home.", "must be a line of bAbI, a number and a sentence"),
        (b"3", "must be a line of bAbI"),
        (b"3 a\tb\tc\td", "must be a line of bAbI"),
        (b"3 caf\xe9", r"must be a line of bAbI.*caf\\xe9"),
        (b"1 Where?\there", "must have facts before it and an answer"),
        (b"3 Where?\t \t1", "must have facts before it and an answer"),
    ],
)
def test_a_malformed_line_of_babi_is_named(tmp_path, line, problem):
    path = tmp_path / "qa.txt"
    path.write_bytes(b"1 One.\n2 Two.\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"qa\.txt:3 {problem}"):
        read_stories(path)


def test_two_answers_to_one_question_are_refused(write_lines, tmp_path):
    turned = TWO | {"facts": TWO["facts"][::-1], "answer": "B"}
    # what is told last may be what counts
    assert len(read_stories(write_lines(TWO, turned, TWO))) == 3
    problem = (
        r"lines\.jsonl:4 must have the answer of .*lines\.jsonl:1, 'A', .*'What is\?'.* got 'B'"
    )
    with pytest.raises(DataError, match=problem):
        read_stories(write_lines(TWO, turned, TWO, TWO | {"answer": "B"}))
    path = tmp_path / "qa.txt"
    path.write_text(BABI + "1 The hall is old.\n2 What is old?\thouse\t1\n")
    with pytest.raises(DataError, match=r"qa\.txt:9 must have the answer of .*qa\.txt:7, 'hall'"):
        read_stories(path)


def test_a_file_without_stories_is_refused(write_lines, tmp_path):
    with pytest.raises(DataError, match="must hold at least one story, got none"):
        read_stories(write_lines(""))
    with pytest.raises(DataError, match=r"must be in an existing file, .* got '.*missing'"):
        read_stories(str(tmp_path / "missing"))
