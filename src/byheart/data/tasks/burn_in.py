"""Long documents that share their beginnings, so that these are cheap to read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from byheart.data.tasks.sample import TaskSample
from byheart.data.tasks.task import Task

__all__ = ["BurnIn", "draw_burn_in"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BurnIn:
    """Documents in two parts."""

    beginnings: list[TaskSample]
    """Whole segments without a question, all of the same length."""
    endings: list[TaskSample]
    """What follows them, with the question."""
    groups: list[int]
    """Which of the beginnings each ending follows."""


def draw_burn_in(
    task: Task,
    indices: Sequence[int],
    seed: tuple[int, ...],
    *,
    num_beginnings: int,
    burn_in_segments: int,
    num_segments: int,
) -> BurnIn:
    """Draw documents that share their beginnings.

    Each beginning holds the facts with a probability of one half. So a reader learns to keep what
    it has read long ago, and to read it after a long time without any. Each holds the fragments of
    the task with a probability of one half, too: documents of evaluation have none. If both parts
    have as many segments, the first document of a beginning repeats its background.

    Args:
        task: The documents, in clean form.
        indices: Which of them.
        seed: Non-negative numbers that decide which beginnings hold facts, and which fragments.
        num_beginnings: Different beginnings, at most as many as documents.
        burn_in_segments: Segments of a beginning.
        num_segments: Segments of an ending.

    Returns:
        One ending per index. Endings of beginnings with facts have none of their own, and ask for
        those.

    Source:
        Kapturowski et al. 2019, Recurrent Experience Replay in Distributed Reinforcement Learning,
        which calls it burn-in.
    """
    num_beginnings = min(num_beginnings, len(indices))
    groups = [place * num_beginnings // len(indices) for place in range(len(indices))]
    whole = [
        task.sample(indices[groups.index(group)], burn_in_segments)
        for group in range(num_beginnings)
    ]
    draws = np.random.default_rng(seed).random((2, num_beginnings)) < 0.5
    has_facts, has_fragments = draws.tolist()
    endings = []
    for index, group in zip(indices, groups, strict=True):
        ending, before = task.sample(index, num_segments), whole[group]
        if has_facts[group]:
            ending = replace(_without_facts(ending), question=before.question, label=before.label)
        # nobody knows what stands before it
        first = tuple(entry for entry in ending.fragments if entry[0] > 0)
        endings.append(replace(ending, fragments=first))
    num_tokens = burn_in_segments * task.config.segment_length
    beginnings = [
        replace(
            part,
            num_tokens=num_tokens,
            question=part.question[:0],
            fragments=part.fragments if has_fragments[group] else (),
        )
        for group, part in enumerate(
            before if has_facts[group] else _without_facts(before)
            for group, before in enumerate(whole)
        )
    ]
    return BurnIn(beginnings=beginnings, endings=endings, groups=groups)


def _without_facts(sample: TaskSample) -> TaskSample:
    """Take the facts out of a document, and leave its fragments behind the same words.

    Returns:
        The document, with as much more of its background.
    """
    fragments = tuple(
        (position - sum(len(fact) for place, fact in sample.facts if place < position), tokens)
        for position, tokens in sample.fragments
    )
    return replace(sample, facts=(), fragments=fragments)
