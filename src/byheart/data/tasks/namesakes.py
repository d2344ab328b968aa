"""Stories whose people are called like those of the facts."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["add_namesakes"]

# a capital in the middle of a sentence
_INSIDE_SENTENCE = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")
_MIN_TIMES = 3


def add_namesakes(
    texts: Sequence[str], names: Sequence[str], share: float, rng: np.random.Generator
) -> list[str]:
    """Call people of stories by other names.

    People are words that begin with a capital letter inside sentences three times at least, and are
    never written small in the same story. Some places are taken for people, too.

    Args:
        texts: The stories.
        names: What people are called.
        share: Share of the people of each story, on average, that get another name.
        rng: Source of the draws.

    Returns:
        The stories, in each of which a person has one name from beginning to end.
    """
    return [_rename(text, names, share, rng) for text in texts]


def _rename(text: str, names: Sequence[str], share: float, rng: np.random.Generator) -> str:
    words = set(re.findall(r"\b[a-z]+\b", text))
    times = Counter(_INSIDE_SENTENCE.findall(text))
    people = sorted(
        w for w, count in times.items() if count >= _MIN_TIMES and w.lower() not in words
    )
    new = {person: str(rng.choice(names)) for person in people if rng.random() < share}
    if not new:
        return text
    return re.sub(rf"\b({'|'.join(new)})\b", lambda match: new[match[0]], text)
