"""Stories from a file, such as bAbI's, and their deterministic split."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from byheart.data.files import bare_name, open_stream
from byheart.data.tasks.facts import Split, Story
from byheart.errors import DataError

__all__ = ["read_stories", "split_stories"]

# sentence or question, answer, numbers of the facts that support it
_BABI_PARTS = 3
# one in ten groups of stories is held out
_HELD_OUT_SHARE = 10


def read_stories(path: str | os.PathLike[str], *, num_facts: int | None = None) -> list[Story]:
    """Read stories of some facts, a question and an answer.

    Args:
        path: A file of bAbI's own (`.txt`), or JSON lines, either perhaps compressed (`.gz`, `.xz`,
            `.zst`). Each JSON record has `facts` (strings), `question` and `answer` (strings);
            other keys are passed over.
        num_facts: How many facts each story must have; `None` for any number.

    Returns:
        The stories in the order of the file, repetitions included.

    Raises:
        DataError: If there is no such file, a line is no such record, no line holds one, or two
            give different answers to the same question about the same facts.

    Source:
        Weston et al. 2015, Towards AI-Complete Question Answering (arXiv:1502.05698): a line of
        bAbI begins with a number, 1 for a new story; a question has its answer behind a tab.
    """
    file = Path(path)
    if not file.is_file():
        msg = (
            "Stories must be in an existing file, JSON lines or bAbI's own, got "
            f"{os.fspath(path)!r}. Check the path."
        )
        raise DataError(msg)
    with open_stream(file) as (content, _):
        lines = [(line, f"{file}:{i}") for i, line in enumerate(content, start=1) if line.strip()]
    parse = _parse_babi if bare_name(file.name).endswith(".txt") else _parse_json
    stories = []
    known: dict[tuple[tuple[str, ...], str], tuple[str, str]] = {}
    for story, where in parse(lines):
        if num_facts is not None and len(story.facts) != num_facts:
            msg = f"{where} must have {num_facts} facts, got {list(story.facts)}. Correct the line."
            raise DataError(msg)
        answer, first = known.setdefault((story.facts, story.question), (story.answer, where))
        if story.answer != answer:
            msg = (
                f"{where} must have the answer of {first}, {answer!r}, because facts and question "
                f"{story.question!r} are the same, got {story.answer!r}. Correct one of the lines."
            )
            raise DataError(msg)
        stories.append(story)
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


def _parse_json(lines: list[tuple[bytes, str]]) -> Iterator[tuple[Story, str]]:
    for line, where in lines:
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
        if not isinstance(facts, list) or not facts or not all(map(_is_text, facts)):
            msg = f"{where} must have sentences under 'facts', got {facts!r}. Correct the line."
            raise DataError(msg)
        for key, value in (("question", question), ("answer", answer)):
            if not _is_text(value):
                msg = f"{where} must have a text under {key!r}, got {value!r}. Correct the line."
                raise DataError(msg)
        yield Story(facts=tuple(facts), question=str(question), answer=str(answer)), where


def _parse_babi(lines: list[tuple[bytes, str]]) -> Iterator[tuple[Story, str]]:
    facts: tuple[str, ...] = ()
    for line, where in lines:
        # what is not UTF-8 is shown in the message, and in no story
        number, _, rest = line.decode("utf-8", errors="replace").strip().partition(" ")
        parts = [part.strip() for part in rest.split("\t")]
        is_line = number.isdecimal() and parts[0] and len(parts) <= _BABI_PARTS
        if not is_line or "\ufffd" in rest:
            msg = (
                f"{where} must be a line of bAbI, a number and a sentence, or a number, a question "
                f"and its answer behind a tab, got {line!r}. Correct the line."
            )
            raise DataError(msg)
        if number == "1":
            facts = ()
        if len(parts) == 1:
            facts += (parts[0],)
        elif facts and parts[1]:
            yield Story(facts=facts, question=parts[0], answer=parts[1]), where
        else:
            msg = f"{where} must have facts before it and an answer, got {line!r}. Correct it."
            raise DataError(msg)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
