"""Stories for `reason` from a JSON lines file, and their deterministic split."""

import hashlib
import json
import os
from pathlib import Path

from byheart.data.files import open_stream
from byheart.data.tasks.facts import Split, Story
from byheart.errors import DataError

__all__ = ["read_stories", "split_stories"]

_NUM_FACTS = 2
# one in ten groups of stories is held out
_HELD_OUT_SHARE = 10


def read_stories(path: str | os.PathLike[str]) -> list[Story]:
    """Read stories of two facts, a question and an answer.

    Args:
        path: JSON lines, perhaps compressed (`.gz`, `.xz`, `.zst`). Each record has `facts` (two
            strings), `question` and `answer` (strings); other keys are passed over.

    Returns:
        The stories in the order of the file, repetitions included.

    Raises:
        DataError: If there is no such file, a line is no such record, or no line holds one.
    """
    file = Path(path)
    if not file.is_file():
        msg = (
            f"facts must be the path of a JSON lines file, got {os.fspath(path)!r}. Check the path."
        )
        raise DataError(msg)
    with open_stream(file) as (content, _):
        stories = [
            _parse(line, f"{file}:{number}")
            for number, line in enumerate(content, start=1)
            if line.strip()
        ]
    if not stories:
        msg = f"{file} must hold at least one story, got none. Check the path."
        raise DataError(msg)
    return stories


def split_stories(stories: list[Story], split: Split) -> list[Story]:
    """Take one split of the stories of a file, without repetitions.

    Stories with the same facts, in any order, stay together. Such groups are sorted by the SHA-256
    of their facts, and the first tenth (at least one) is held out for validation.

    Args:
        stories: All stories of the file.
        split: Which part to give.

    Returns:
        Different stories, in the order of the file.

    Raises:
        DataError: If an answer would not occur in training.
    """
    unique = list(dict.fromkeys(stories))
    groups = sorted({_group(story) for story in unique})
    held_out = set(groups[: max(1, len(groups) // _HELD_OUT_SHARE)])
    train = [story for story in unique if _group(story) not in held_out]
    unseen = {story.answer for story in unique} - {story.answer for story in train}
    if unseen:
        msg = (
            f"Every answer of facts must occur in the training split, {sorted(unseen)} do not with "
            f"{len(groups)} different pairs of facts, {len(held_out)} of them held out. "
            "Add stories with other facts to the file, or use form='report', which does not split."
        )
        raise DataError(msg)
    return train if split == "train" else [s for s in unique if _group(s) in held_out]


def _group(story: Story) -> str:
    return hashlib.sha256("\n".join(sorted(story.facts)).encode()).hexdigest()


def _parse(line: bytes, where: str) -> Story:
    try:
        record = json.loads(line)
    # ValueError covers broken JSON and bytes that are not UTF-8
    except (ValueError, RecursionError) as err:
        msg = f"{where} must be a JSON record: {err}. Correct the line."
        raise DataError(msg) from err
    if not isinstance(record, dict):
        msg = f"{where} must be a JSON object, got {type(record).__name__}. Correct the line."
        raise DataError(msg)
    facts, question, answer = (record.get(key) for key in ("facts", "question", "answer"))
    if not isinstance(facts, list) or len(facts) != _NUM_FACTS or not all(map(_is_text, facts)):
        msg = f"{where} must have two sentences under 'facts', got {facts!r}. Correct the line."
        raise DataError(msg)
    for key, value in (("question", question), ("answer", answer)):
        if not _is_text(value):
            msg = f"{where} must have a text under {key!r}, got {value!r}. Correct the line."
            raise DataError(msg)
    return Story(facts=tuple(facts), question=str(question), answer=str(answer))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
