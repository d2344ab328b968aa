"""Stories whose people are called like those of the facts."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["add_namesakes"]

_NAME = r"[A-Z][a-z]+"
# a capital in the middle of a sentence, but neither "the Martian" nor "Mr. Holcomb"
_INSIDE_SENTENCE = re.compile(rf"(?<=[a-z,] )(?<!\b[Tt]he )({_NAME})\b(?!\. [A-Z])")
_DOES = "said|asked|told|thought|looked|nodded|smiled|laughed|answered|replied|cried|shouted|turned"
_PERSON = re.compile(rf"\b({_NAME}) (?:{_DOES})\b|\b(?:{_DOES}) ({_NAME})\b")
_MIN_TIMES = 3


def add_namesakes(
    texts: Sequence[str], names: Sequence[str], share: float, rng: np.random.Generator
) -> list[str]:
    """Call people of stories by other names.

    People are words that begin with a capital letter inside sentences three times at least, are
    never written small in the same story, and do once what people do, such as saying something.

    Args:
        texts: The stories.
        names: What people are called.
        share: Share of the people of each story, on average, that get another name.
        rng: Source of the draws.

    Returns:
        The stories, in each of which a person has one name from beginning to end. Several people
        can have the same.
    """
    return [_rename(text, names, share, rng) for text in texts]


def _rename(text: str, names: Sequence[str], share: float, rng: np.random.Generator) -> str:
    words = set(re.findall(r"\b[a-z]+\b", text))
    people = {name for pair in _PERSON.findall(text) for name in pair}
    times = Counter(name for name in _INSIDE_SENTENCE.findall(text) if name in people)
    found = sorted(
        name for name, count in times.items() if count >= _MIN_TIMES and name.lower() not in words
    )
    new = {name: str(rng.choice(names)) for name in found if rng.random() < share}
    if not new:
        return text
    return re.sub(rf"\b({'|'.join(new)})\b", lambda match: new[match[0]], text)
