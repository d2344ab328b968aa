"""Facts and questions of the tasks: sentences from templates, and which are held out.

In the clean form no fact of the validation split occurs in training, while every word does:

- **People** ("Mary moved to the garden."): of the five verbs that may tell where a person went,
  one is held out for each pair of person and room: verb number `(person + room) % 5`. So every
  pair of person and room, of person and verb and of verb and room still occurs in training.
- **Relations** ("The office is north of the kitchen."): stories are held out by their layout, the
  three rooms in order along the axis. A held-out layout never occurs in training, in no wording,
  order or question; every single sentence does. With the rooms numbered 0 to 5, the layouts
  `(r, r+1, r+3)` and `(r, r+4, r+2)` modulo 6 are held out from south to north, and
  `(r, r+2, r+5)` and `(r, r+5, r+1)` from west to east: 24 of 240, in which each room stands
  equally often in each place.

A quarter of the stories of relations is far harder to learn than the others, see `is_hard`.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Memorization Tasks"
    (arXiv:2304.11062); Weston et al. 2015, Towards AI-Complete Question Answering, tasks 1 and 4
    (arXiv:1502.05698), whose wording the templates follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal, TypeAlias

import numpy as np

__all__ = [
    "DIRECTIONS",
    "KEYS",
    "NAMES",
    "RELATION_ROOMS",
    "ROOMS",
    "VERBS",
    "Split",
    "Story",
    "draw_people",
    "is_direct",
    "is_hard",
    "people_sentences",
    "people_stories",
    "relation_stories",
    "story_sentences",
    "stranger_sentences",
]

Split: TypeAlias = Literal["train", "validation"]

NAMES = ("Mary", "John", "Daniel", "Sandra")
"""Persons of `memorize` and `detect`."""
VERBS = ("moved", "went", "went back", "journeyed", "travelled")
"""Ways to say that a person went to a room."""
ROOMS = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
"""Rooms in the order of the labels of `memorize`, `detect` and `capacity`."""
RELATION_ROOMS = ("bedroom", "bathroom", "garden", "kitchen", "office", "hallway")
"""The same rooms in the order of the labels of `reason`."""
DIRECTIONS = (("south", "north"), ("west", "east"))
"""The two axes of `reason`, each from its low to its high end."""
KEYS = (
    "Mary", "John", "Daniel", "Sandra", "Adam", "Alan", "Albert", "Alice", "Amanda", "Amy",
    "Andrew", "Angela", "Anna", "Anthony", "Arthur", "Barbara", "Ben", "Bernard", "Betty", "Bill",
    "Bob", "Brian", "Bruce", "Carl", "Carol", "Catherine", "Charles", "Chris", "Clara", "Craig",
    "Cynthia", "David", "Deborah", "Dennis", "Diana", "Donald", "Donna", "Dorothy", "Douglas",
    "Edgar", "Edward", "Eleanor", "Elizabeth", "Emily", "Emma", "Eric", "Ernest", "Eva", "Felix",
    "Frances", "Frank", "Fred", "Gary", "George", "Gerald", "Gloria", "Grace", "Greg", "Hannah",
    "Harold", "Harry", "Helen", "Henry", "Howard", "Ian", "Irene", "Isaac", "Jack", "Jacob",
    "James", "Jane", "Janet", "Jason", "Jeff", "Jennifer", "Jerry", "Jessica", "Jim", "Joan",
    "Joe", "Joseph", "Joyce", "Judith", "Julia", "Karen", "Keith", "Ken", "Kevin", "Larry",
    "Laura", "Lawrence", "Leo", "Linda", "Lisa", "Louis", "Lucy", "Margaret", "Maria", "Mark",
    "Martha", "Martin", "Matthew", "Michael", "Nancy", "Nathan", "Nicholas", "Nora", "Oliver",
    "Oscar", "Patricia", "Paul", "Peter", "Philip", "Rachel", "Ralph", "Rebecca", "Richard",
    "Robert", "Roger", "Ruth", "Samuel", "Sarah", "Simon", "Sophie", "Stephen", "Susan",
    "Theresa", "Thomas", "Victor", "Walter",
)  # fmt: skip
"""Persons of `capacity`; the first four are `NAMES`."""

_STRANGERS = (
    *KEYS[len(NAMES) :], "He", "She", "They", "I", "We", "Everyone", "Nobody", "The man",
    "The woman", "The boy", "The girl", "The captain", "The doctor", "His father", "Her mother",
    "My brother", "Our guest", "The old man", "The robot", "Mr. Brown", "Mrs. Hill",
)  # fmt: skip
_ELSEWHERE = (
    *(f"{verb} to the" for verb in VERBS), "walked to the", "walked into the", "ran into the",
    "hurried to his", "strode to her", "came into the", "came out of the", "backed out of the",
    "had left the", "stood in the", "was in the", "is at the", "was late to the", "worked in the",
    "sat in my", "looked into the", "turned to the little", "burst into the", "called from the",
)  # fmt: skip

# (steps from the first to the second and third room) of the layouts held out, for each axis
_HELD_OUT_STEPS = (((1, 3), (4, 2)), ((2, 5), (5, 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """Facts and a question that one of them answers."""

    facts: tuple[str, ...]
    """Sentences that the document must hold."""
    question: str
    """Sentence at the end of the document."""
    answer: str
    """One word, a label of the task."""


def people_stories(split: Split | None) -> list[Story]:
    """List the facts of `memorize` and `detect`, each with its question.

    Args:
        split: 96 facts to train on or the 24 held out; `None` gives all 120.

    Returns:
        One story per fact; each room is the answer equally often.
    """
    return [
        _people_story([(name, verb, room)], 0)
        for name, verb, room in product(range(len(NAMES)), range(len(VERBS)), range(len(ROOMS)))
        if split is None or verb in _verbs(name, room, split)
    ]


def draw_people(rng: np.random.Generator, num_facts: int, split: Split) -> Story:
    """Draw facts about different persons and ask for one of them.

    Args:
        rng: Source of the draw.
        num_facts: At most the number of `KEYS`.
        split: Whether from the facts to train on or from those held out.

    Returns:
        A story whose first fact holds the answer.
    """
    facts: list[tuple[int, int, int]] = []
    for name in rng.permutation(len(KEYS))[:num_facts].tolist():
        room = int(rng.integers(len(ROOMS)))
        verbs = _verbs(name, room, split)
        facts.append((name, verbs[rng.integers(len(verbs))], room))
    return _people_story(facts, 0)


def people_sentences() -> tuple[list[str], list[str]]:
    """List every sentence that `draw_people` uses; `people_stories` uses some of them.

    Returns:
        The facts and the questions.
    """
    everyone = range(len(KEYS))
    everything = product(everyone, range(len(VERBS)), range(len(ROOMS)))
    return [_people_fact(*fact) for fact in everything], [_where(name) for name in everyone]


def stranger_sentences() -> list[str]:
    """List sentences that look like facts of `memorize` and `detect` and are none.

    Returns:
        Somebody who is none of `NAMES` goes, is or was in each of the rooms.
    """
    return [
        f"{stranger} {elsewhere} {room}."
        for stranger, elsewhere, room in product(_STRANGERS, _ELSEWHERE, ROOMS)
    ]


def story_sentences(stories: Sequence[Story]) -> list[str]:
    """List every sentence of some stories once.

    Args:
        stories: Any stories.

    Returns:
        Facts and questions, in the order in which they first occur.
    """
    return list(dict.fromkeys(s for story in stories for s in (*story.facts, story.question)))


def relation_stories(split: Split | None) -> list[Story]:
    """List the stories of `reason`: two facts about three rooms on one axis.

    The two facts tell how the middle room lies to each of the others, in either wording and order.
    The question asks for the room that one fact starts with, by that fact's direction ("What is
    north of the kitchen?") or by the opposite one ("What is the kitchen south of?"). These are all
    the stories bAbI's generator can make, each once; bAbI's own files hold some more often.

    Args:
        split: 6,912 stories to train on or the 768 held out; `None` gives all 7,680.

    Returns:
        The stories; each room is the answer equally often.
    """
    stories = []
    for axis, layout in product((0, 1), permutations(range(len(RELATION_ROOMS)), 3)):
        if split is None or (split == "validation") == _is_held_out(axis, layout):
            low, middle, high = (RELATION_ROOMS[room] for room in layout)
            stories += _layout_stories(low, middle, high, DIRECTIONS[axis])
    return stories


def is_hard(story: Story) -> bool:
    """Tell whether a story of `reason` is one that the rooms do not give away.

    In a quarter of the stories both facts end with the same room, so that only the direction tells
    the answer: "The A is north of the C. The B is south of the C. What is north of the C?" Half of
    them turn the direction round: "What is the C south of?"

    Args:
        story: A story.

    Returns:
        `True` if it is one.
    """
    return len({fact.split()[-1] for fact in story.facts}) == 1 < len(story.facts)


def is_direct(story: Story) -> bool:
    """Tell whether a story's question says what a fact says, in the same order.

    Args:
        story: A story.

    Returns:
        `True` if the question ends with the room that a fact ends with.
    """
    return story.question.split()[-1].rstrip("?") in {
        fact.split()[-1].rstrip(".") for fact in story.facts
    }


def _people_story(facts: Sequence[tuple[int, int, int]], asked: int) -> Story:
    name, _, room = facts[asked]
    sentences = tuple(_people_fact(*fact) for fact in facts)
    return Story(facts=sentences, question=_where(name), answer=ROOMS[room])


def _people_fact(name: int, verb: int, room: int) -> str:
    return f"{KEYS[name]} {VERBS[verb]} to the {ROOMS[room]}."


def _where(name: int) -> str:
    return f"Where is {KEYS[name]}?"


def _verbs(name: int, room: int, split: Split) -> list[int]:
    held_out = (name + room) % len(VERBS)
    return [verb for verb in range(len(VERBS)) if (verb == held_out) == (split == "validation")]


def _is_held_out(axis: int, layout: tuple[int, ...]) -> bool:
    first, second, third = layout
    steps = (second - first) % len(RELATION_ROOMS), (third - first) % len(RELATION_ROOMS)
    return steps in _HELD_OUT_STEPS[axis]


def _layout_stories(low: str, middle: str, high: str, axis: tuple[str, str]) -> list[Story]:
    # each relation as (room that is asked for, its direction, the other room, the way back)
    down, up = axis
    lower = ((low, down, middle, up), (middle, up, low, down))
    upper = ((middle, down, high, up), (high, up, middle, down))
    stories = []
    for pair in product(lower, upper):
        for first, second in permutations(pair):
            facts = tuple(f"The {x} is {way} of the {y}." for x, way, y, _ in (first, second))
            for answer, way, other, back in (first, second):
                questions = f"What is {way} of the {other}?", f"What is the {other} {back} of?"
                stories += [Story(facts=facts, question=q, answer=answer) for q in questions]
    return stories
