"""Questions about something that a long text mentions once: can a language model find it again?

| probe | the text says somewhere | answers to choose from |
|---|---|---|
| `passkey` | a key of five digits | it and nine other keys |
| `multi-key` | the numbers of several persons | those numbers |
| `babi` | the facts of a story, in their order | the answers of all stories |

The text around is that of real documents, and comes twice only where it is longer than all of them.
The question ends the text. What the model then finds likely tells whether it remembers: the answer
among others, and the answer as the model's own continuation.

Source:
    `passkey`: Mohtashami and Jaggi 2023, Landmark Attention (arXiv:2305.16300), without the
    instruction and with real text around. `multi-key`: Hsieh et al. 2024, RULER (arXiv:2404.06654).
    `babi`: Weston et al. 2015 (arXiv:1502.05698) in long texts as by Kuratov et al. 2024, BABILong
    (arXiv:2406.10149).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int32

from byheart.choices import require_choices
from byheart.data.tasks.facts import KEYS, Story
from byheart.data.tasks.placement import place_anywhere
from byheart.data.tasks.sample import TaskSample
from byheart.data.tasks.stories_file import read_stories
from byheart.data.tasks.streams import ShuffledStream, Stories, read_background
from byheart.data.tokenize import Tokenizer
from byheart.errors import DataError

__all__ = ["Probe", "ProbeConfig", "ProbeName", "ProbeSample"]

ProbeName: TypeAlias = Literal["passkey", "multi-key", "babi"]

_STORY_SEED, _BACKGROUND_SEED = 0, 1
_NUM_PASSKEYS = 10
_PASSKEYS = 10_000, 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Which probe, and from what."""

    name: ProbeName
    """The probe."""
    num_keys: int = 8
    """Persons whose number the text tells; `multi-key` only."""
    stories: str | None = None
    """File of stories that `read_stories` reads, such as bAbI's; `babi` needs it."""
    background: str | None = None
    """Documents in any format `iter_documents` reads; `None` takes the stories that come with
    byheart."""

    def __post_init__(self) -> None:
        require_choices(self)
        if not 2 <= self.num_keys <= len(KEYS):
            msg = f"num_keys must be between 2 and {len(KEYS)}, got {self.num_keys}."
            raise ValueError(msg)
        if (self.stories is None) == (self.name == "babi"):
            need = "a file of stories" if self.name == "babi" else "None"
            msg = f"stories must be {need} for name='{self.name}', got {self.stories!r}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeSample:
    """A text that ends with a question, and answers to choose from."""

    text: TaskSample
    """The text; `fact_positions` tells where its facts stand."""
    candidates: tuple[Int32[np.ndarray, " _answer"], ...]
    """Tokens of each answer."""
    answer: int
    """Index of the right one."""


class Probe:
    """Texts of one probe: sample `index` is the same in every process and at every time.

    Args:
        config: What to make.
        tokenizer: Turns it into tokens. Its start token, if it has one, begins each text.
        seed: Another seed gives other texts.

    Raises:
        DataError: If background or stories cannot be used.
    """

    def __init__(self, config: ProbeConfig, tokenizer: Tokenizer, *, seed: int = 0) -> None:
        if seed < 0:
            msg = f"seed must be at least 0, got {seed}."
            raise ValueError(msg)
        self.config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._background = Stories(read_background(config.background, "validation"), tokenizer)
        self._stories: list[Story] = []
        if config.stories is not None:
            self._stories = list(dict.fromkeys(read_stories(config.stories)))
            if len({story.answer for story in self._stories}) == 1:
                msg = (
                    f"{config.stories} must hold stories with two answers or more, got "
                    f"{self._stories[0].answer!r} alone."
                )
                raise DataError(msg)

    @property
    def num_background_tokens(self) -> int:
        """Tokens of all documents of the background: longer texts repeat them."""
        return len(self._background.ids)

    def sample(self, index: int, num_tokens: int) -> ProbeSample:
        """Make a text.

        Args:
            index: Which one, counted from 0. There is no last one.
            num_tokens: Its length, the start token and the question included.

        Returns:
            A text determined by `seed`, `index` and `num_tokens` alone.

        Raises:
            ValueError: If `index` is negative, or the text too short for facts and question.
        """
        if index < 0:
            msg = f"index must be at least 0, got {index}."
            raise ValueError(msg)
        seed = (self._seed, index, num_tokens)
        rng = np.random.default_rng((*seed, _STORY_SEED))
        story, candidates = self._draw(rng)
        *facts, question = self._tokenizer.encode_batch(
            [f" {sentence}" for sentence in (*story.facts, story.question)]
        )
        start_id = self._tokenizer.start_id
        first = 0 if start_id is None else 1
        lengths = [len(fact) for fact in facts]
        num_background = num_tokens - first - len(question) - sum(lengths)
        if num_background < 0:
            msg = (
                f"num_tokens must be at least {num_tokens - num_background} to hold facts and "
                f"question, got {num_tokens}. Ask for longer texts."
            )
            raise ValueError(msg)
        is_story = self.config.name == "babi"
        positions = place_anywhere(
            rng, lengths, num_background, num_background + 1, in_order=is_story
        )
        text = TaskSample(
            num_tokens=num_tokens,
            num_segments=1,
            label=candidates.index(story.answer),
            facts=tuple(zip((place + first for place in positions), facts, strict=True)),
            fragments=() if start_id is None else ((0, np.array([start_id], dtype=np.int32)),),
            question=question,
            background=ShuffledStream(self._background, (*seed, _BACKGROUND_SEED)),
            tokenizer=self._tokenizer,
        )
        answers = self._tokenizer.encode_batch([f" {answer}" for answer in candidates])
        return ProbeSample(text=text, candidates=tuple(answers), answer=text.label)

    def _draw(self, rng: np.random.Generator) -> tuple[Story, Sequence[str]]:
        # the question as far as the answer, and answers to choose from
        if self.config.name == "babi":
            story = self._stories[rng.integers(len(self._stories))]
            answers = sorted({story.answer for story in self._stories})
            asking = Story(
                facts=story.facts, question=f"{story.question} Answer:", answer=story.answer
            )
            return asking, answers
        num = _NUM_PASSKEYS if self.config.name == "passkey" else self.config.num_keys
        span = _PASSKEYS[1] - _PASSKEYS[0]
        keys = [str(_PASSKEYS[0] + key) for key in rng.choice(span, num, replace=False).tolist()]
        if self.config.name == "passkey":
            fact = f"The pass key is {keys[0]}. Remember it. {keys[0]} is the pass key."
            question = "What is the pass key? The pass key is"
            return Story(facts=(fact,), question=question, answer=keys[0]), keys
        names = [KEYS[name] for name in rng.permutation(len(KEYS))[:num].tolist()]
        facts = tuple(f"The number of {n} is {k}." for n, k in zip(names, keys, strict=True))
        question = f"What is the number of {names[0]}? The number of {names[0]} is"
        return Story(facts=facts, question=question, answer=keys[0]), keys
