"""Which task to make, and how."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from byheart.choices import require_choices, require_finite, require_whole

__all__ = ["TaskConfig", "TaskForm", "TaskName"]

TaskName: TypeAlias = Literal["memorize", "detect", "reason", "capacity"]
TaskForm: TypeAlias = Literal["clean", "report"]

_MAX_FACTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Which task, in which form, for segments of which length."""

    name: TaskName
    """The task."""
    form: TaskForm = "clean"
    """Disjoint facts at any place, or the report's exact arithmetic."""
    segment_length: int
    """Usable text tokens of a segment: 499 for BERT's window of 512 with 10 memory tokens."""
    num_facts: int = 1
    """Facts of a document, 1 to 64; `capacity` only."""
    facts: str | None = None
    """JSON lines with `facts` (two), `question` and `answer`, such as bAbI task 4; `reason` only.

    `None` takes all stories bAbI's generator can make."""
    fragments: float = 0.0
    """Parts of facts per segment, on average, that stand in the background without being facts
    ("went to the kitchen"); not in the report's form."""
    strangers: float = 0.0
    """Sentences per segment, on average, that say of somebody else where they are or go ("The
    captain walked into the office."), as stories do; `memorize` and `detect`, not in the report's
    form."""
    namesakes: float = 0.0
    """Share of the people in the background's stories that are called like those of the facts;
    `memorize` and `detect`, not in the report's form."""
    num_questions: int = 1
    """Questions about the same facts in the same background, in documents that follow each other;
    `reason` only. Never more than the facts with most questions allow."""
    any_length: bool = False
    """Whether documents end anywhere in their last segment, which holds the whole question, instead
    of filling it; not in the report's form."""
    background: str | None = None
    """Documents in any format `iter_documents` reads. Give each split its own.

    `None` takes the stories that come with byheart, of which those of the splits differ."""
    more_stories: bool = False
    """Whether 87 more follow the 31 stories to train on that come with byheart: eleven times as
    much text, for readers who must not take stories for facts."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_finite(self)
        require_whole(self)
        if self.segment_length < 1:
            msg = f"segment_length must be at least 1, got {self.segment_length}."
            raise ValueError(msg)
        if not 1 <= self.num_facts <= _MAX_FACTS:
            msg = f"num_facts must be between 1 and {_MAX_FACTS}, got {self.num_facts}."
            raise ValueError(msg)
        if self.num_facts != 1 and self.name != "capacity":
            msg = (
                f"num_facts must be 1 for name='{self.name}', got {self.num_facts}. Use 'capacity'."
            )
            raise ValueError(msg)
        self._check_lures()
        self._check_questions()
        if self.facts is not None and self.name != "reason":
            msg = f"facts must be None for name='{self.name}', got {self.facts!r}. Use 'reason'."
            raise ValueError(msg)
        if self.more_stories and self.background is not None:
            msg = (
                "more_stories must be false where another background takes the place of byheart's "
                f"stories, got background={self.background!r}. Set more_stories=false."
            )
            raise ValueError(msg)
        if self.form == "report":
            self._check_report()

    def _check_lures(self) -> None:
        for field in ("fragments", "strangers"):
            if getattr(self, field) < 0:
                msg = f"{field} must be at least 0, got {getattr(self, field)}."
                raise ValueError(msg)
        if not 0 <= self.namesakes <= 1:
            msg = f"namesakes is a share and must be between 0 and 1, got {self.namesakes}."
            raise ValueError(msg)
        for field in ("strangers", "namesakes"):
            if getattr(self, field) and self.name not in {"memorize", "detect"}:
                got = getattr(self, field)
                msg = f"{field} must be 0 for name='{self.name}', got {got}. Set it to 0."
                raise ValueError(msg)

    def _check_questions(self) -> None:
        if self.num_questions < 1:
            msg = f"num_questions must be at least 1, got {self.num_questions}."
            raise ValueError(msg)
        if self.num_questions != 1 and self.name != "reason":
            msg = f"num_questions must be 1 for name='{self.name}', got {self.num_questions}."
            raise ValueError(msg)

    def _check_report(self) -> None:
        for field in ("fragments", "strangers", "namesakes"):
            if getattr(self, field):
                got = getattr(self, field)
                msg = (
                    f"{field} must be 0 for form='report', got {got}. Set it to 0, or use 'clean'."
                )
                raise ValueError(msg)
        if self.any_length:
            msg = "any_length must be false for form='report', got true. Use 'clean'."
            raise ValueError(msg)
        if self.name == "capacity":
            msg = "form must be 'clean' for name='capacity', got 'report', which has no such task."
            raise ValueError(msg)
