"""Stages of growing documents: when the next one begins, and when the run ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from byheart.choices import require_choices
from byheart.training.config import require_at_least

__all__ = ["Curriculum", "CurriculumConfig", "Evaluation", "Outcome"]

Outcome = Literal["running", "reached", "not reached"]

# apart from the randomness of the lengths
_BURN_IN_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """How the documents grow: stage N has documents of at most N segments."""

    lessons: bool = False
    """Whether `reason` goes through all stages twice, first with those stories alone that are
    hardly learned among the others; see `byheart.data.tasks.Task.lesson`."""
    min_segments: int = 1
    """Segments of the first stage, and of the shortest documents."""
    max_segments: int = 7
    """Segments of the last stage (the report: 7)."""
    lengths: Literal["stage", "mixed"] = "mixed"
    """`stage`: all documents of stage N have N segments (the report). `mixed`: each batch has N
    segments with probability `stage_share`, and otherwise `min_segments` to N of them, all
    equally likely."""
    stage_share: float = 0.5
    """Share of the batches that have the full length of the stage without a draw; `mixed` only."""
    advance_accuracy: float = 0.995
    """Accuracy on held-out documents of N segments at which stage N has been reached."""
    evaluate_every: int = 50
    """Steps between evaluations."""
    evaluate_samples: int = 400
    """Held-out documents of an evaluation."""
    stage_steps: int = 4000
    """Steps that a stage may take; then the run ends, and says which stage was not reached."""
    continue_steps: int = 800
    """Steps after the last stage has been reached: accuracy on longer documents still rises."""
    continue_segments: int | None = None
    """Segments of the longest documents in those steps; `None` for `max_segments`. What is kept
    over many more segments than were ever read in training wears away."""
    burn_in_segments: int = 0
    """Segments, at most, that are read before a document without a gradient in those steps: at
    least `min_segments`, and as often 1 to 2 as 2 to 4 and so on; 0 for none. What the memory
    becomes in so many segments, in which perhaps nothing happens, no shorter document shows."""
    burn_in_share: float = 0.5
    """Share of the steps with such a beginning."""
    burn_in_rows: int = 4
    """Different beginnings of a forward pass; its documents share them, so they cost little."""
    keep_stages: bool = False
    """Whether the model is kept as it was when each stage was reached. That is a whole model per
    stage: 3 GB for a BERT and 7 stages, and only their comparison needs it."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name, least in (
            ("min_segments", 1),
            ("max_segments", self.min_segments),
            ("evaluate_every", 1),
            ("evaluate_samples", 1),
            ("stage_steps", self.evaluate_every),
            ("continue_steps", 0),
            ("burn_in_segments", 0),
            ("burn_in_rows", 1),
        ):
            require_at_least(name, getattr(self, name), least)
        if self.burn_in_segments:
            require_at_least("burn_in_segments", self.burn_in_segments, self.min_segments)
        if self.continue_segments is not None:
            require_at_least("continue_segments", self.continue_segments, self.max_segments)
        for name in ("stage_share", "advance_accuracy", "burn_in_share"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name} must be between 0 and 1, got {getattr(self, name)}."
                raise ValueError(msg)

    @property
    def num_stages(self) -> int:
        """Stages of the whole run, lessons included."""
        return self.num_lengths * (2 if self.lessons else 1)

    @property
    def num_lengths(self) -> int:
        """Stages that differ in the length of their documents."""
        return self.max_segments - self.min_segments + 1

    @property
    def longest(self) -> int:
        """Segments of the longest documents of the whole run."""
        continued = self.continue_segments if self.continue_steps else None
        return continued or self.max_segments

    @property
    def most_stage_steps(self) -> int:
        """Steps after which a stage is given up: `stage_steps`, up to the next evaluation."""
        return math.ceil(self.stage_steps / self.evaluate_every) * self.evaluate_every

    @property
    def most_steps(self) -> int:
        """Steps of the longest run: every stage is reached at the last evaluation that counts."""
        return self.num_stages * self.most_stage_steps + self.continue_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation of the curriculum."""

    step: int
    """Optimizer steps done."""
    num_segments: int
    """Segments of the documents: the stage."""
    accuracy: float
    """Share of right answers on held-out documents."""
    lesson: bool = False
    """Whether they were those of a lesson."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """How far a run has come. All of it follows from its evaluations; nothing changes it."""

    config: CurriculumConfig
    evaluations: tuple[Evaluation, ...] = ()
    """All so far, in the order of their steps."""

    @property
    def reached(self) -> tuple[Evaluation, ...]:
        """The evaluation in which each stage was reached, lessons first."""
        found: list[Evaluation] = []
        for evaluation in self.evaluations:
            is_current = len(found) < self.config.num_stages
            if is_current and evaluation.accuracy >= self.config.advance_accuracy:
                found.append(evaluation)
        return tuple(found)

    @property
    def lesson(self) -> bool:
        """Whether the run is in a lesson."""
        return self.config.lessons and len(self.reached) < self.config.num_lengths

    @property
    def stage(self) -> int:
        """Segments of the documents that are evaluated on."""
        config, passed = self.config, len(self.reached)
        if passed == config.num_stages:
            return config.max_segments
        return config.min_segments + passed % config.num_lengths

    @property
    def longest(self) -> int:
        """Segments of the longest documents that are trained on."""
        if self.saturated_at is not None and self.config.continue_segments is not None:
            return self.config.continue_segments
        return self.stage

    @property
    def stage_start(self) -> int:
        """Step after which the stage began."""
        earlier = self.reached[: self.config.num_stages - 1]
        return earlier[-1].step if earlier else 0

    @property
    def saturated_at(self) -> int | None:
        """Step at which the last stage was reached; `None` if it was not yet."""
        reached = self.reached
        return reached[-1].step if len(reached) == self.config.num_stages else None

    def longest_stage(self, step: int) -> int:
        """Find the most steps that a stage has taken.

        Args:
            step: Optimizer steps done.

        Returns:
            Steps, those of a stage that is not reached yet included.
        """
        ends = [0, *(evaluation.step for evaluation in self.reached)]
        if self.saturated_at is None:
            ends.append(step)
        return max(end - start for start, end in pairwise(ends))

    def num_continued(self, step: int) -> int:
        """Count the steps after the last stage was reached.

        Args:
            step: Optimizer steps done.

        Returns:
            Steps; 0 if it was not reached.
        """
        return 0 if self.saturated_at is None else step - self.saturated_at

    @property
    def last_step(self) -> int:
        """Last step of the run, if each stage that is left takes as long as it may."""
        config = self.config
        if self.saturated_at is not None:
            return self.saturated_at + config.continue_steps
        left = config.num_stages - len(self.reached)
        return self.stage_start + left * config.most_stage_steps + config.continue_steps

    def outcome(self, step: int) -> Outcome:
        """Tell whether the run is over.

        Args:
            step: Optimizer steps done, evaluations included.

        Returns:
            `running`; `reached` when the last stage was reached and `continue_steps` have passed;
            `not reached` when a stage has had its `stage_steps` in vain.
        """
        if self.saturated_at is not None:
            is_over = step >= self.saturated_at + self.config.continue_steps
            return "reached" if is_over else "running"
        evaluated = self.evaluations[-1].step if self.evaluations else 0
        is_over = evaluated - self.stage_start >= self.config.stage_steps
        return "not reached" if is_over else "running"

    def record(self, step: int, accuracy: float) -> "Curriculum":
        """Add an evaluation of the current stage.

        Args:
            step: Optimizer steps done.
            accuracy: Share of right answers.

        Returns:
            The curriculum after it.
        """
        new = Evaluation(step=step, num_segments=self.stage, accuracy=accuracy, lesson=self.lesson)
        return replace(self, evaluations=(*self.evaluations, new))

    def num_segments(self, seed: int, step: int) -> int:
        """Choose the length of the documents of a step.

        Args:
            seed: Of the run.
            step: Optimizer steps done before.

        Returns:
            Segments, the same for all documents of the step.
        """
        longest = self.longest
        if self.config.lengths == "stage":
            return longest
        generator = np.random.default_rng((seed, step))
        if generator.random() < self.config.stage_share:
            return longest
        return int(generator.integers(self.config.min_segments, longest + 1))

    def num_burn_in(self, seed: int, step: int) -> int:
        """Choose how many segments are read before the documents of a step.

        Args:
            seed: Of the run.
            step: Optimizer steps done before.

        Returns:
            Segments, the same for all documents of the step; 0 for none.
        """
        most = self.config.burn_in_segments
        if self.saturated_at is None or not most:
            return 0
        generator = np.random.default_rng((seed, step, _BURN_IN_SEED))
        if generator.random() >= self.config.burn_in_share:
            return 0
        least = self.config.min_segments
        return round(math.exp(generator.uniform(math.log(least), math.log(most))))

    def rate_share(
        self,
        step: int,
        schedule: Literal["constant", "linear", "cosine"],
        warmup_steps: int,
        length_decay: float = 0.0,
    ) -> float:
        """Give the learning rate of a step.

        Args:
            step: Optimizer steps done before.
            schedule: How it falls after the last stage was reached.
            warmup_steps: Steps in which it rises.
            length_decay: Power of the segments of the longest documents that it is divided by.

        Returns:
            Share of the highest rate.
        """
        share = math.pow(self.longest, -length_decay)
        share *= min(1.0, step / warmup_steps) if warmup_steps else 1.0
        if schedule == "constant" or self.saturated_at is None or not self.config.continue_steps:
            return share
        passed = min(1.0, (step - self.saturated_at) / self.config.continue_steps)
        left = 1 - passed if schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return share * left

    def to_list(self) -> list[dict[str, Any]]:
        """Give the evaluations as JSON can hold them.

        Returns:
            One dictionary per evaluation.
        """
        return [
            {
                "step": e.step,
                "num_segments": e.num_segments,
                "accuracy": e.accuracy,
                "lesson": e.lesson,
            }
            for e in self.evaluations
        ]

    @classmethod
    def from_list(
        cls, config: CurriculumConfig, evaluations: Sequence[dict[str, Any]]
    ) -> "Curriculum":
        """Rebuild a curriculum from what `to_list` gave.

        Returns:
            The curriculum.
        """
        return cls(config=config, evaluations=tuple(Evaluation(**entry) for entry in evaluations))
