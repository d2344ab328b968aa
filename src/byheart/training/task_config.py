"""What a run that learns a task with recurrent memory is made of, as configs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from byheart.choices import require_choices, require_finite
from byheart.data.tasks import TaskConfig, TaskForm, TaskName
from byheart.models.recurrent_config import RecurrentMemoryConfig
from byheart.training.config import MAY_BE_INFINITE, TrainingConfig, require_at_least
from byheart.training.curriculum import CurriculumConfig
from byheart.training.encoder_config import EncoderConfig

__all__ = [
    "CurriculumConfig",
    "EncoderConfig",
    "MemoryPart",
    "TaskEvaluationConfig",
    "TaskPart",
    "TaskRunConfig",
    "TaskTrainingConfig",
]

# BERT's window: [CLS] memory [SEP] text [SEP]
_SPECIAL_TOKENS = 3
_FRAGMENTS = 2.0
_NUM_QUESTIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPart:
    """The documents of a run, see `byheart.data.tasks.TaskConfig`."""

    name: TaskName
    """The task."""
    form: TaskForm = "clean"
    """Facts never trained on, at any place, or the report's exact arithmetic."""
    num_facts: int = 1
    """Facts of a document; `capacity` only."""
    facts: str | None = None
    """File of stories, such as bAbI task 4; `reason` only. `None` takes all bAbI could make."""
    fragments: float | None = None
    """Parts of facts per segment, on average, in the background of training: only whole facts
    count. `None` is two per segment, and none in the report's form. Evaluation has
    only what its stories have."""
    strangers: float = 0.0
    """Sentences about somebody else per segment, on average, in the background of training;
    `memorize` and `detect`. Evaluation has only what its stories have."""
    namesakes: float = 0.0
    """Share of the people in the stories of training that are called like those of the facts;
    `memorize` and `detect`. Evaluation has its stories as they are."""
    num_questions: int | None = None
    """Questions about the same facts in the same background, in training, so that documents of a
    batch differ in the question alone. `None` is four in `reason`, and one in the report's form."""
    any_length: bool | None = None
    """Whether documents of training end anywhere in their last segment. `None` is yes in `reason`,
    and no in the report's form. Those of evaluation fill it."""
    background: str | None = None
    """Documents around the facts of training; `None` takes the stories that come with byheart."""
    more_stories: bool = False
    """Whether training has all 118 stories to train on that come with byheart, eleven times as much
    text as the 31 that it has without. Not with another background."""
    validation_background: str | None = None
    """Documents around the facts of evaluation."""

    def __post_init__(self) -> None:
        if (self.background is None) != (self.validation_background is None):
            msg = (
                "background and validation_background must be given together, got "
                f"{self.background!r} and {self.validation_background!r}: evaluation must not read "
                "what training has read."
            )
            raise ValueError(msg)
        if (
            self.background is not None
            and self.validation_background is not None
            and Path(self.background).resolve() == Path(self.validation_background).resolve()
        ):
            msg = (
                "validation_background must be other documents than background, got "
                f"{self.background!r} twice: evaluation must not read what training has read."
            )
            raise ValueError(msg)
        # refuses what no task is, while the settings are still at hand
        self.resolve(1, "train")

    def resolve(self, segment_length: int, split: Literal["train", "validation"]) -> TaskConfig:
        """Give the config of the documents of a split.

        Args:
            segment_length: Text tokens of a segment.
            split: Which documents.

        Returns:
            What to make a `Task` of.
        """
        return TaskConfig(
            name=self.name,
            form=self.form,
            segment_length=segment_length,
            num_facts=self.num_facts,
            facts=self.facts,
            num_questions=self._num_questions if split == "train" else 1,
            fragments=self._fragments if split == "train" else 0.0,
            strangers=self.strangers if split == "train" else 0.0,
            namesakes=self.namesakes if split == "train" else 0.0,
            any_length=self._any_length if split == "train" else False,
            more_stories=self.more_stories and split == "train",
            background=self.background if split == "train" else self.validation_background,
        )

    @property
    def _any_length(self) -> bool:
        if self.any_length is not None:
            return self.any_length
        return self.name == "reason" and self.form == "clean"

    @property
    def _num_questions(self) -> int:
        if self.num_questions is not None:
            return self.num_questions
        return _NUM_QUESTIONS if self.name == "reason" and self.form == "clean" else 1

    @property
    def _fragments(self) -> float:
        if self.fragments is not None:
            return self.fragments
        return _FRAGMENTS if self.form == "clean" else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPart:
    """The memory of a run, see `byheart.models.recurrent_config.RecurrentMemoryConfig`."""

    num_memory_tokens: int = 10
    """Vectors that are passed on."""
    update: Literal["replace", "gated"] = "replace"
    """Whether what was written replaces the memory (the report) or is mixed into it."""
    gate_bias_init: float = -2.0
    """First value of the gate's bias; `gated` only."""
    gate_noise: float = 1.0
    """Noise on the gate's logits in training; `gated` only."""
    normalize_memory: bool = False
    """Whether what was written is layer-normalised."""
    noise: float = 0.0
    """Noise on the memory in training, relative to its standard deviation."""
    replay: bool = False
    """Whether segments are computed again for the backward pass: constant activation memory."""
    bptt_depth: int | None = None
    """Segments that the loss reaches backwards; `None` for all."""

    def __post_init__(self) -> None:
        # refuses what no memory is, while the settings are still at hand
        self.resolve(1, "clean")

    def resolve(
        self,
        segment_length: int,
        form: TaskForm,
        *,
        start_ids: tuple[int, ...] = (),
        separator_ids: tuple[int, ...] = (),
    ) -> RecurrentMemoryConfig:
        """Give the config of the memory.

        Args:
            segment_length: Text tokens of a segment.
            form: Of the documents: the report's have a short first segment.
            start_ids: BERT's `[CLS]`.
            separator_ids: BERT's `[SEP]`, between memory and text and at the end.

        Returns:
            What to make a `RecurrentMemory` with.
        """
        return RecurrentMemoryConfig(
            segment_length=segment_length,
            num_memory_tokens=self.num_memory_tokens,
            alignment="right" if form == "report" else "left",
            bptt_depth=self.bptt_depth,
            replay=self.replay,
            start_ids=start_ids,
            separator_ids=separator_ids,
            end_ids=separator_ids,
            update=self.update,
            gate_bias_init=self.gate_bias_init,
            gate_noise=self.gate_noise,
            normalize_memory=self.normalize_memory,
            noise=self.noise,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTrainingConfig:
    """How a task is learned. Optimizer: AdamW; loss: mean over the documents of a step."""

    rows_per_device: int = 32
    """Documents that a process reads at the same time in one forward pass."""
    accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Highest rate, of documents of one segment."""
    length_decay: float = 0.5
    """Power of the length of the longest documents that the rate is divided by: the more segments a
    gradient goes back through, the more a step changes."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls, from its highest value when the last stage is reached to 0 at the end of
    `curriculum.continue_steps`: how long the stages take is not known before."""
    warmup_steps: int = 100
    """Steps in which the rate rises linearly from 0."""
    weight_decay: float = 0.1
    """Decay of the matrices; biases, norms, embeddings and memory tokens have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages of gradients and of their squares."""
    max_gradient_norm: float = 1.0
    """Longer gradients, over all parameters, are scaled down to this length; `inf` scales none."""
    write_cost: float = 0.0
    """What it costs to rewrite the whole memory in every segment, in nats, once the last stage has
    been reached: added to the loss, times the share that is rewritten. With `memory.update=gated`
    only; it closes the gates where nothing is worth it."""
    average_decay: float = 0.98
    """Decay per step of a running average of the weights. It is the average that is evaluated,
    decides on stages and is kept; 0 for the weights themselves."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products, also in evaluation; weights, optimizer and memory are
    always float32. bfloat16 trains 1.6 times as fast on processors that multiply in it (AVX-512
    BF16, AMX), and slower on others."""
    seed: int = 0
    """Decides first weights, documents and dropout."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Complete checkpoints that stay; at least 2, so that a damaged one has a predecessor."""
    log_every: int = 10
    """Steps between log lines."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least("length_decay", self.length_decay, 0)
        require_at_least("write_cost", self.write_cost, 0)
        if not 0 <= self.average_decay < 1:
            msg = f"average_decay must be at least 0 and below 1, got {self.average_decay}."
            raise ValueError(msg)
        # refuses what cannot be trained with, while the settings are still at hand
        self.resolve(CurriculumConfig())

    def resolve(self, curriculum: CurriculumConfig) -> TrainingConfig:
        """Give the config of the steps. The learning rate is the curriculum's.

        Args:
            curriculum: How long the run may be.

        Returns:
            What the Trainer needs.
        """
        return TrainingConfig(
            rows_per_device=self.rows_per_device,
            accumulation_steps=self.accumulation_steps,
            max_steps=curriculum.most_steps,
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
            max_gradient_norm=self.max_gradient_norm,
            precision=self.precision,
            seed=self.seed,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
            evaluate_every=curriculum.evaluate_every,
            log_every=self.log_every,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEvaluationConfig:
    """What is measured at the end of a run, on held-out facts."""

    segments: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Lengths of the documents."""
    samples: int = 400
    """Documents of each length."""
    rows: int = 50
    """Documents read at the same time."""

    def __post_init__(self) -> None:
        if not self.segments:
            msg = "segments must name at least one length, got none."
            raise ValueError(msg)
        for name, value in (("segments", min(self.segments)), ("samples", self.samples),
                            ("rows", self.rows)):  # fmt: skip
            require_at_least(name, value, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRunConfig:
    """Everything a run that learns a task depends on."""

    name: str
    """What the run is called."""
    task: TaskPart
    """The documents."""
    window: int = 64
    """Positions of the encoder: text, memory and three special tokens (the report: 512)."""
    encoder: EncoderConfig | None = field(default_factory=EncoderConfig)
    """An encoder with random weights and a vocabulary of its own."""
    pretrained: str | None = None
    """Instead: folder of a Hugging Face encoder with its tokenizer."""
    pretrained_dropout: float | None = None
    """Share that the pretrained encoder drops, of weights of attention and hidden values; `None` is
    what its config says. With 0 a step on a CPU takes about a third of the time."""
    memory: MemoryPart = field(default_factory=MemoryPart)
    """The memory."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """How the documents grow."""
    training: TaskTrainingConfig = field(default_factory=TaskTrainingConfig)
    """Batch, optimizer, checkpoints."""
    evaluation: TaskEvaluationConfig = field(default_factory=TaskEvaluationConfig)
    """What is measured at the end."""

    def __post_init__(self) -> None:
        if (self.encoder is None) == (self.pretrained is None):
            given = "none" if self.encoder is None else "both"
            msg = (
                f"Either encoder or pretrained must be given, got {given}. For a pretrained "
                "encoder set pretrained=FOLDER and encoder=null."
            )
            raise ValueError(msg)
        require_finite(self, but=MAY_BE_INFINITE)
        self._check_dropout()
        if self.curriculum.lessons and self.task.name != "reason":
            msg = f"curriculum.lessons must be false for the task {self.task.name!r}, got true."
            raise ValueError(msg)
        depth, longest = self.memory.bptt_depth, self.curriculum.longest
        if depth is not None and depth > longest:
            msg = (
                f"memory.bptt_depth must be at most the {longest} segments of the longest documents"
                f" (curriculum), got {depth}: it would cut nothing off. Use null for all segments."
            )
            raise ValueError(msg)
        if self.curriculum.burn_in_segments and self.task.form != "clean":
            msg = (
                "curriculum.burn_in_segments must be 0 for task.form='report', whose documents are "
                f"cut from the end, got {self.curriculum.burn_in_segments}. Use 'clean'."
            )
            raise ValueError(msg)
        self._check_write_cost()
        if self.segment_length < 1:
            msg = (
                f"window must be at least {1 - self.segment_length + self.window}: "
                f"{self.memory.num_memory_tokens} memory tokens, {_SPECIAL_TOKENS} special tokens "
                f"and text, got {self.window}."
            )
            raise ValueError(msg)

    def _check_dropout(self) -> None:
        dropout = self.pretrained_dropout
        if dropout is not None and self.pretrained is None:
            msg = (
                f"pretrained_dropout must be null without a pretrained encoder, got {dropout}. Set "
                "encoder.dropout."
            )
            raise ValueError(msg)
        if dropout is not None and not 0 <= dropout < 1:
            msg = f"pretrained_dropout must be at least 0 and below 1, got {dropout}."
            raise ValueError(msg)

    def _check_write_cost(self) -> None:
        if not self.training.write_cost:
            return
        memory = self.memory
        if memory.update != "gated" or memory.num_memory_tokens == 0:
            msg = (
                f"training.write_cost must be 0 for memory.update={memory.update!r} with "
                f"{memory.num_memory_tokens} memory tokens, got {self.training.write_cost}. Use "
                "memory.update=gated and memory tokens."
            )
            raise ValueError(msg)

    @property
    def segment_length(self) -> int:
        """Text tokens of a segment."""
        return self.window - self.memory.num_memory_tokens - _SPECIAL_TOKENS
