"""The tasks of the Recurrent Memory Transformer report, and one more for the capacity of a memory.

| task | facts | where they stand in the clean form | asked |
|---|---|---|---|
| `memorize` | one person in a room | anywhere in the first segment | the room |
| `detect` | one person in a room | anywhere | the room |
| `reason` | two relations of three rooms | anywhere, in either order | a room that only one tells |
| `capacity` | 1 to 64 persons, each in a room | anywhere | the room of one of them |

All are classification into rooms; the question ends the document. In the **clean** form, held-out
facts are never trained on (how they are chosen: `byheart.data.tasks.facts`), a fact begins at any
token, so that it may cross a segment boundary, and no background comes twice. On request, parts of
facts stand in the background ("went to the kitchen"), as stories have them too, strangers ("The
captain walked into the office."), and people called like those of the facts. Only a document longer
than the whole background goes on with the same stories in another order. The **report** form is the
report's own: same facts in training and evaluation, the same place in every segment
(`byheart.data.tasks.placement`), one article repeated for the whole document.

Source:
    Bulatov et al. 2023, Scaling Transformer to 1M tokens and beyond with RMT, "Memorization Tasks"
    (arXiv:2304.11062).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from jaxtyping import Int32

from byheart.data.tasks.config import TaskConfig
from byheart.data.tasks.facts import (
    NAMES,
    RELATION_ROOMS,
    ROOMS,
    Split,
    Story,
    draw_people,
    is_direct,
    is_hard,
    people_sentences,
    people_stories,
    relation_stories,
    story_sentences,
    stranger_sentences,
)
from byheart.data.tasks.namesakes import add_namesakes
from byheart.data.tasks.placement import REPORT_SPECIALS, place_anywhere, place_like_report
from byheart.data.tasks.sample import TaskSample
from byheart.data.tasks.stories_file import read_stories, split_stories
from byheart.data.tasks.streams import (
    PeriodicStream,
    ShuffledStream,
    Stories,
    TokenStream,
    read_background,
)
from byheart.data.tokenize import Tokenizer

__all__ = ["Task"]

# facts take their randomness apart from the background, so that neither depends on how much the
# other consumes
_FACT_SEED, _BACKGROUND_SEED, _FRAGMENT_SEED, _LENGTH_SEED, _STRANGER_SEED = 0, 1, 2, 3, 4
_NAMESAKE_SEED = 5
# so many first words of a fact, which tell of whom or what it is, no fragment has: "Mary" and "The
# office"
_SUBJECT_WORDS = {"memorize": 1, "detect": 1, "reason": 2, "capacity": 1}
# what may stand before a name
_BEFORE_NAMES = ("", " ", "\n", "\n\n", '"', "'", "\u201c", "\u2018", "(", "-", "\u2014", ".")


class Task:
    """Documents of one task: sample `index` is the same in every process and at every time.

    The background is tokenised once, here, but in report form an article when it first occurs.

    Args:
        config: What to make.
        tokenizer: Turns it into tokens.
        split: In clean form, whether facts are those to train on or those held out. In both forms,
            which of the stories that come with byheart are the background.
        seed: Another seed gives other documents.

    Raises:
        ValueError: If a segment cannot hold facts and question, of `capacity` one fact and the
            question, `split` or `seed` is out of range, or more stories are asked for to evaluate
            with.
        DataError: If the background or the file of facts cannot be used.
    """

    def __init__(
        self, config: TaskConfig, tokenizer: Tokenizer, *, split: Split, seed: int = 0
    ) -> None:
        if split not in get_args(Split):
            msg = f"split must be 'train' or 'validation', got {split!r}."
            raise ValueError(msg)
        if seed < 0:
            msg = f"seed must be at least 0, got {seed}."
            raise ValueError(msg)
        self.config = config
        self.tokenizer = tokenizer
        self.split: Split = split
        self.seed = seed
        self._stories, self.labels = _stories(config, split)
        """The answers, in the order of their indices."""
        self._sentences = self._encode_sentences()
        self._subjects = self._count_subjects()
        """Tokens of each fact that say of whom or what it is."""
        self._ends = self._last_of_subjects()
        strangers = stranger_sentences() if config.strangers else []
        self._strangers = list(self._encode(strangers).values())
        self._longest = self._check_lengths()
        self._asked = _by_facts(self._stories or ())
        texts = read_background(config.background, split, more=config.more_stories)
        if config.namesakes:
            rng = np.random.default_rng((seed, _NAMESAKE_SEED))
            texts = add_namesakes(texts, NAMES, config.namesakes, rng)
        self._background = _Background(texts, tokenizer, is_report=config.form == "report")

    @property
    def num_labels(self) -> int:
        """Number of answers to choose from."""
        return len(self.labels)

    @property
    def min_segments(self) -> int:
        """Fewest segments of a document: 1, or what many facts of `capacity` need at most."""
        return -(-self._longest // self.config.segment_length)

    def lesson(self) -> "Task":
        """Give the stories alone that are hard to learn among the others, asked directly.

        Returns:
            The same task with those stories, see `is_hard` in `byheart.data.tasks.facts`, and
            without fragments of facts.

        Raises:
            ValueError: If there are no hard stories: only `reason` has some.
        """
        lesson = copy.copy(self)
        lesson.config = replace(self.config, fragments=0.0)
        stories = self._stories or ()
        lesson._stories = [story for story in stories if is_hard(story) and is_direct(story)]
        lesson._asked = _by_facts(lesson._stories)
        if not lesson._stories:
            msg = (
                "A lesson needs stories of 'reason' whose facts and question end with the same "
                f"room, the {self.split} stories of name='{self.config.name}' have none here. "
                "Go without."
            )
            raise ValueError(msg)
        return lesson

    def sample(self, index: int, num_segments: int) -> TaskSample:
        """Make a document.

        In clean form it has exactly `segment_length * num_segments` tokens, with `any_length` at
        most so many and as many segments. In report form it has
        2 fewer, as a batch of its own; `pad_questions` makes those of a larger batch. There
        documents take the articles of the background in turn.

        Args:
            index: Which one, counted from 0. There is no last one.
            num_segments: Its length in segments.

        Returns:
            A document determined by `seed`, `split`, `index` and `num_segments` alone. With
            `num_questions`, those that follow each other differ in their question.

        Raises:
            ValueError: If `index` is negative, or `num_segments` less than `min_segments`.
        """
        if index < 0:
            msg = f"index must be at least 0, got {index}."
            raise ValueError(msg)
        if num_segments < self.min_segments:
            msg = (
                f"num_segments must be at least {self.min_segments} (num_facts "
                f"{self.config.num_facts}, segment_length {self.config.segment_length}), "
                f"got {num_segments}."
            )
            raise ValueError(msg)
        body, question_number = divmod(index, self._num_questions)
        seed = (self.seed, get_args(Split).index(self.split), body, num_segments)
        rng = np.random.default_rng((*seed, _FACT_SEED))
        story = self._draw_story(rng, question_number)
        facts = [self._sentences[fact] for fact in story.facts]
        question = self._sentences[story.question]
        is_report = self.config.form == "report"
        lengths = [len(fact) for fact in facts]
        num_tokens = self.config.segment_length * num_segments
        num_tokens -= REPORT_SPECIALS if is_report else 0
        if self.config.any_length:
            before = max(sum(lengths), self.config.segment_length * (num_segments - 1))
            lengths_rng = np.random.default_rng((*seed, _LENGTH_SEED))
            num_tokens = int(lengths_rng.integers(before + len(question), num_tokens + 1))
        num_background = num_tokens - len(question) - sum(lengths)
        background = self._background.stream(body, (*seed, _BACKGROUND_SEED))
        fragments = self._draw_fragments(seed, num_segments, num_background, background)
        num_background -= sum(len(tokens) for _, tokens in fragments)
        others = [(gap, len(tokens)) for gap, tokens in fragments]
        positions = self._place(rng, lengths, num_segments, num_background, others)
        return TaskSample(
            num_tokens=num_tokens,
            num_segments=num_segments,
            label=self.labels.index(story.answer),
            facts=tuple(zip(positions, facts, strict=False)),
            fragments=tuple(
                (position, tokens)
                for position, (_, tokens) in zip(positions[len(facts) :], fragments, strict=True)
            ),
            question=question,
            background=background,
            tokenizer=self.tokenizer,
            overwrites=is_report and self.config.name != "memorize",
            is_report=is_report,
        )

    @property
    def _num_questions(self) -> int:
        return min(self.config.num_questions, max(map(len, self._asked.values()), default=1))

    def _draw_story(self, rng: np.random.Generator, question_number: int = 0) -> Story:
        if self._stories is None:
            return draw_people(rng, self.config.num_facts, self.split)
        story = self._stories[rng.integers(len(self._stories))]
        asked = self._asked[story.facts]
        return asked[(asked.index(story) + question_number) % len(asked)]

    def _draw_fragments(
        self, seed: tuple[int, ...], num_segments: int, num_background: int, background: TokenStream
    ) -> list[tuple[int, Int32[np.ndarray, " _fragment"]]]:
        # how many background tokens each has before it, and its tokens
        if not self.config.fragments and not self.config.strangers:
            return []
        rng = np.random.default_rng((*seed, _FRAGMENT_SEED))
        drawn = [(tokens, False) for tokens in self._draw_strangers(seed, num_segments)]
        for _ in range(rng.poisson(self.config.fragments * num_segments)):
            facts = self._draw_story(rng).facts
            fact = facts[rng.integers(len(facts))]
            tokens, start = self._sentences[fact], self._subjects[fact]
            first = int(rng.integers(start, len(tokens)))
            stop = int(rng.integers(first, len(tokens))) + 1
            drawn.append((tokens[first:stop], first == start))
        kept, left = [], num_background
        for tokens, is_predicate in drawn:
            # at least half of the background stays
            if len(tokens) <= left - num_background // 2:
                kept.append((tokens, is_predicate))
                left -= len(tokens)
        gaps = rng.integers(left + 1, size=len(kept)).tolist()
        return [
            (gap, tokens)
            for gap, (tokens, is_predicate) in zip(gaps, kept, strict=True)
            # a person in the stories would make a fact of what follows
            if not is_predicate or gap == 0 or background.read(gap - 1, gap)[0] not in self._ends
        ]

    def _draw_strangers(
        self, seed: tuple[int, ...], num_segments: int
    ) -> list[Int32[np.ndarray, " _sentence"]]:
        if not self.config.strangers:
            return []
        rng = np.random.default_rng((*seed, _STRANGER_SEED))
        count = rng.poisson(self.config.strangers * num_segments)
        return [self._strangers[place] for place in rng.integers(len(self._strangers), size=count)]

    def _place(
        self,
        rng: np.random.Generator,
        lengths: list[int],
        num_segments: int,
        num_background: int,
        others: list[tuple[int, int]],
    ) -> list[int]:
        name, segment_length = self.config.name, self.config.segment_length
        if self.config.form == "report" and name != "capacity":
            return place_like_report(
                rng, name, lengths, segment_length=segment_length, num_segments=num_segments
            )
        num_gaps = num_background + 1
        if name == "memorize":
            # with what may stand before it, the fact still begins in the first segment
            before = sum(length for gap, length in others if gap < segment_length)
            num_gaps = max(1, segment_length - before)
        return place_anywhere(rng, lengths, num_background, num_gaps, others)

    def _encode_sentences(self) -> dict[str, Int32[np.ndarray, " _token"]]:
        if self._stories is None:
            facts, questions = people_sentences()
            sentences = [*facts, *questions]
        else:
            sentences = story_sentences(self._stories)
        return self._encode(sentences)

    def _encode(self, sentences: list[str]) -> dict[str, Int32[np.ndarray, " _token"]]:
        # in the report a fact stands directly before its text, without a space between
        prefix = "" if self.config.form == "report" else " "
        encoded = self.tokenizer.encode_batch([prefix + sentence for sentence in sentences])
        return dict(zip(sentences, encoded, strict=True))

    def _count_subjects(self) -> dict[str, int]:
        if self._stories is None:
            facts, _ = people_sentences()
        else:
            facts = [fact for story in self._stories for fact in story.facts]
        words = _SUBJECT_WORDS[self.config.name]
        subjects = {fact: " ".join(fact.split()[:words]) for fact in facts}
        encoded = self._encode(list(dict.fromkeys(subjects.values())))
        return {
            # of a fact without words behind its subject one token is left
            fact: min(len(encoded[subject]), len(self._sentences[fact]) - 1)
            for fact, subject in subjects.items()
        }

    def _last_of_subjects(self) -> set[int]:
        # a tokenizer may have tokens of their own for a name behind a quotation mark or a new line
        words = _SUBJECT_WORDS[self.config.name]
        subjects = list(dict.fromkeys(" ".join(fact.split()[:words]) for fact in self._subjects))
        last = {int(self._sentences[fact][n - 1]) for fact, n in self._subjects.items()}
        for before in _BEFORE_NAMES:
            last.update(
                int(ids[-1])
                for ids in self.tokenizer.encode_batch([before + subject for subject in subjects])
            )
        return last

    def _check_lengths(self) -> int:
        # the tokens that a document needs at most besides its background
        length = {sentence: len(ids) for sentence, ids in self._sentences.items()}
        if self._stories is None:
            facts, questions = people_sentences()
            fact = max(length[sentence] for sentence in facts)
            question = max(length[sentence] for sentence in questions)
            needed, longest = fact + question, self.config.num_facts * fact + question
        else:
            fact = max(sum(length[fact] for fact in story.facts) for story in self._stories)
            question = max(length[story.question] for story in self._stories)
            specials = REPORT_SPECIALS if self.config.form == "report" else 0
            needed = longest = fact + question + specials
        if self.config.segment_length < needed:
            msg = (
                f"segment_length must be at least {needed} to hold facts and question, "
                f"got {self.config.segment_length}. Raise it, or take a tokenizer that needs "
                "fewer tokens."
            )
            raise ValueError(msg)
        return longest


class _Background:
    """The streams of a task: shuffled stories, or in report form one article over and over."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, *, is_report: bool) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._stories = None if is_report else Stories(texts, tokenizer)
        self._articles: dict[int, PeriodicStream] = {}

    def stream(self, index: int, seed: tuple[int, ...]) -> TokenStream:
        if self._stories is not None:
            return ShuffledStream(self._stories, seed)
        article = index % len(self._texts)
        if article not in self._articles:
            self._articles[article] = PeriodicStream(self._texts[article], self._tokenizer)
        return self._articles[article]


def _by_facts(stories: Sequence[Story]) -> dict[tuple[str, ...], list[Story]]:
    """Put those together that differ in their question alone.

    Returns:
        The stories by their facts.
    """
    groups: dict[tuple[str, ...], list[Story]] = {}
    for story in stories:
        groups.setdefault(story.facts, []).append(story)
    return groups


def _stories(config: TaskConfig, split: Split) -> tuple[list[Story] | None, tuple[str, ...]]:
    # those of `capacity` are composed as they are drawn
    shared = None if config.form == "report" else split
    if config.name == "capacity":
        return None, ROOMS
    if config.name != "reason":
        return people_stories(shared), ROOMS
    if config.facts is None:
        return relation_stories(shared), RELATION_ROOMS
    stories = read_stories(config.facts, num_facts=2)
    labels = tuple(dict.fromkeys(story.answer for story in stories))
    return (stories if shared is None else split_stories(stories, shared)), labels
