"""Stages of growing documents: when the next one begins, and when the run ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from byheart.training.task_config import CurriculumConfig

__all__ = ["Curriculum", "Evaluation", "Outcome"]

Outcome = Literal["running", "reached", "not reached"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation of the curriculum."""

    step: int
    """Optimizer steps done."""
    num_segments: int
    """Segments of the documents: the stage."""
    accuracy: float
    """Share of right answers on held-out documents."""
    lesson: int = 0
    """Number of the lesson whose documents they were; 0 for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """How far a run has come. All of it follows from its evaluations; nothing changes it."""

    config: CurriculumConfig
    evaluations: tuple[Evaluation, ...] = ()
    """All so far, in the order of their steps."""

    @property
    def reached(self) -> tuple[Evaluation, ...]:
        """The evaluation in which each stage was reached, the lessons first."""
        found: list[Evaluation] = []
        for evaluation in self.evaluations:
            is_current = len(found) < self.config.num_stages
            if is_current and evaluation.accuracy >= self.config.advance_accuracy:
                found.append(evaluation)
        return tuple(found)

    @property
    def lesson(self) -> int:
        """Number of the lesson that the run is in; 0 if it is past them."""
        number = len(self.reached) + 1
        return number if number <= self.config.lessons else 0

    @property
    def stage(self) -> int:
        """Segments of the longest documents that are trained on."""
        passed = max(0, len(self.reached) - self.config.lessons)
        return min(self.config.min_segments + passed, self.config.max_segments)

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
        if self.config.lengths == "stage":
            return self.stage
        generator = np.random.default_rng((seed, step))
        if generator.random() < self.config.stage_share:
            return self.stage
        return int(generator.integers(self.config.min_segments, self.stage + 1))

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
            length_decay: Power of the stage's segments that it is divided by.

        Returns:
            Share of the highest rate.
        """
        share = math.pow(self.stage, -length_decay)
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
