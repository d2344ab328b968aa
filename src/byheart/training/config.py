"""What a training run is made of, as configs."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from byheart.adapters.attach_config import AttachConfig
from byheart.choices import require_choices, require_finite
from byheart.data.documents import FolderAs, OnBad
from byheart.models.config import DecoderConfig, preset

__all__ = [
    "MAY_BE_INFINITE",
    "Compile",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PretrainedConfig",
    "RunConfig",
    "TrainingConfig",
    "require_at_least",
]

# the share that the authors' cosine schedule ends at
_DEFAULT_MIN_RATIO = 0.1
# NumPy's generators take none above
_LARGEST_SEED = 2**32 - 1

MAY_BE_INFINITE = ("max_gradient_norm",)
"""Fields of runs in which infinity means something."""

Compile: TypeAlias = Literal["no", "default", "reduce-overhead"]
"""Whether, and in which mode of `torch.compile`, the steps of a run are compiled."""

SHORT_LOSS = "nats_per_token/short"
"""Metric of `EvaluationConfig.short_tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a model is trained. Optimizer: AdamW; loss: mean over the predicted tokens of a step."""

    rows_per_device: int = 8
    """Documents that a process reads at the same time in one forward pass."""
    accumulation_steps: int = 1
    """Forward passes per optimizer step; each has rows and memory of its own."""
    max_steps: int = 10_000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Highest rate."""
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    """How the rate goes on after the warm-up; `rsqrt` is the paper's 1 / sqrt(step)."""
    min_learning_rate_ratio: float | None = None
    """Rate at the last step, as a share of `learning_rate`, for `cosine` and `linear`; `None` means
    0.1 there. The other schedules have no end."""
    warmup_steps: int = 1000
    """Steps in which the rate rises linearly from 0 (the paper: 1000)."""
    weight_decay: float = 0.1
    """Decay of the matrices; norms, embedding and the scalars of the memory have none."""
    gate_learning_rate_factor: float = 10.0
    """Rate of the attention scales, position biases and memory gates, in units of the others'.
    They move too slowly under AdamW otherwise."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of gradients and of their squares."""
    max_gradient_norm: float = 1.0
    """Longer gradients, over all parameters, are scaled down to this length; `inf` scales none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products; weights and optimizer are always float32. A CPU without an
    instruction for bfloat16 takes many times as long with it: recipes have float32 there."""
    compile: Compile = "no"
    """Compile forward, backward and commit with `torch.compile`: it takes minutes in the first step
    and, on a CPU, a C++ compiler. `reduce-overhead` puts forward and backward into CUDA graphs,
    which byheart has not been run with yet."""
    seed: int = 0
    """Decides first weights, order of documents and dropout."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Complete checkpoints that stay; at least 2, so that a damaged one has a predecessor."""
    evaluate_every: int | None = None
    """Steps between evaluations on the validation documents; `None`: after the last step only."""
    log_every: int = 10
    """Steps between log lines."""

    def __post_init__(self) -> None:
        require_choices(self)
        for name, least in (
            ("rows_per_device", 1),
            ("accumulation_steps", 1),
            ("max_steps", 1),
            ("warmup_steps", 0),
            ("weight_decay", 0),
            ("seed", 0),
            ("save_every", 1),
            ("keep_checkpoints", 2),
            ("log_every", 1),
        ):
            require_at_least(name, getattr(self, name), least)
        if self.evaluate_every is not None:
            require_at_least("evaluate_every", self.evaluate_every, 1)
        for name in ("learning_rate", "gate_learning_rate_factor", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                msg = f"{name} must be above 0, got {getattr(self, name)}."
                raise ValueError(msg)
        if self.seed > _LARGEST_SEED:
            msg = f"seed must be at most {_LARGEST_SEED}, got {self.seed}. Choose a smaller one."
            raise ValueError(msg)
        if not all(0 <= beta < 1 for beta in self.betas):
            msg = f"betas must be at least 0 and below 1, got {self.betas}."
            raise ValueError(msg)
        if self.compile == "reduce-overhead" and self.accumulation_steps > 1:
            msg = (
                "compile='reduce-overhead' must have accumulation_steps=1, got "
                f"{self.accumulation_steps}: a CUDA graph would overwrite the gradients of the "
                "forward pass before. Use compile='default'."
            )
            raise ValueError(msg)
        self._check_schedule()
        require_finite(self, but=MAY_BE_INFINITE)

    def _check_schedule(self) -> None:
        ratio = self.min_learning_rate_ratio
        if ratio is not None and self.schedule in ("rsqrt", "constant"):
            msg = (
                f"min_learning_rate_ratio has no effect with schedule={self.schedule!r}, got "
                f"{ratio}. Leave it out, or use schedule='cosine' or 'linear'."
            )
            raise ValueError(msg)
        if ratio is not None and not 0 <= ratio < 1:
            msg = f"min_learning_rate_ratio must be at least 0 and below 1, got {ratio}."
            raise ValueError(msg)
        if self.schedule == "rsqrt" and self.warmup_steps < 1:
            msg = (
                "schedule='rsqrt' must have warmup_steps of at least 1, got 0: the rate falls with "
                "the root of step / warmup_steps. Raise warmup_steps."
            )
            raise ValueError(msg)

    @property
    def final_rate_ratio(self) -> float:
        """Rate at the last step of a cosine or linear schedule, as a share of the highest."""
        ratio = self.min_learning_rate_ratio
        return _DEFAULT_MIN_RATIO if ratio is None else ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(DecoderConfig):
    """The config of a decoder whose vocabulary may be left to the tokenizer."""

    vocab_size: int = 0
    """Entries of the embedding; 0 for as many as the tokenizer has."""

    @classmethod
    def preset(
        cls, name: str, *, memory_size: int = 0, top_k: int | None = None, **changes: object
    ) -> "ModelConfig":
        """Give the config of a named size, see `byheart.models.config.preset`.

        Args:
            name: The size.
            memory_size: Entries of the kNN memory; 0 for none.
            top_k: Entries retrieved per query.
            changes: Any other field of `DecoderConfig`.

        Returns:
            The config, without a vocabulary.
        """
        decoder = preset(name, 1, memory_size=memory_size, top_k=top_k, **changes)
        return cls(**{**_values(decoder), "vocab_size": 0})

    def resolve(self, vocab_size: int) -> DecoderConfig:
        """Fill the vocabulary in.

        Args:
            vocab_size: What the tokenizer has.

        Returns:
            The config of the decoder.

        Raises:
            ValueError: If the config asks for another vocabulary.
        """
        if self.vocab_size not in (0, vocab_size):
            msg = (
                f"model.vocab_size must be the tokenizer's {vocab_size}, got {self.vocab_size}. "
                "Leave it out."
            )
            raise ValueError(msg)
        return DecoderConfig(**{**_values(self), "vocab_size": vocab_size})

    def _require_at_least(self, name: str, least: int) -> None:
        if name != "vocab_size" or self.vocab_size != 0:
            DecoderConfig._require_at_least(self, name, least)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedConfig:
    """A decoder of Hugging Face with memory on it."""

    path: str
    """Folder of the model, on this machine."""
    memory: AttachConfig = field(default_factory=AttachConfig)
    """What is put on it."""
    from_scratch: bool = False
    """Take random weights, of the shape that the folder's config.json names."""
    trains: Literal["all", "memory", "memory_layers", "lora"] = "all"
    """Which weights learn: all, those of the memory alone, those of the memory and of the layers
    that have one, or those of the memory and LoRA beside the others (`byheart[peft]`), which is
    added to them at the end. Checkpoints then hold only what learns."""
    lora_rank: int = 8
    """Rank of LoRA's matrices."""
    lora_alpha: int = 16
    """What LoRA adds is multiplied by this over the rank."""
    lora_modules: tuple[str, ...] | None = None
    """Layers with LoRA, by the last part of their name; `None` for those that PEFT chooses."""
    gradient_checkpointing: bool = False
    """Keep no activations of the layers and compute them again in the backward pass: less memory,
    about a third more time, the same gradients."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least("lora_rank", self.lora_rank, 1)
        require_at_least("lora_alpha", self.lora_alpha, 1)
        if self.trains == "lora":
            if self.from_scratch:
                msg = "pretrained.from_scratch must be false with trains='lora', got true."
                raise ValueError(msg)
        elif (self.lora_rank, self.lora_alpha, self.lora_modules) != (8, 16, None):
            msg = (
                "pretrained.lora_rank, lora_alpha and lora_modules must be left out unless "
                f"trains='lora', got trains={self.trains!r}."
            )
            raise ValueError(msg)
        elif self.trains != "all" and self.memory.knn is None:
            msg = (
                f"pretrained.trains={self.trains!r} needs a kNN memory, got memory.knn=None: "
                "nothing would learn. Set memory.knn, or trains='all'."
            )
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The documents and the tokenizer of a run."""

    train: str
    """File or folder of the documents to learn from, see `byheart.data.documents`."""
    validation: str | None = None
    """File or folder of the documents to evaluate on; `None` for no evaluation."""
    tokenizer: str = "bytes"
    """`bytes`, the path of a saved tokenizer or `tokenizer.json`, or `bpe:N` for a byte-level BPE
    of at most N tokens learned from the training documents."""
    folder_as: FolderAs = "file"
    """What one document of a folder is: a file, or a sub-folder's files together."""
    on_bad: OnBad = "raise"
    """Whether a record that cannot be read stops the run or is skipped with a warning."""
    text_key: str = "text"
    """Key of a JSON record that holds the text."""
    suffixes: tuple[str, ...] | None = None
    """Endings of the files to take from a folder; `None` takes all."""
    cache_dir: str | None = None
    """Where tokenized documents are kept; `None` for the default."""
    shuffle: bool = True
    """Whether documents come in another order each epoch; `False` keeps the corpus order."""
    min_document_tokens: int = 2
    """Shorter documents are left out of training."""
    max_document_tokens: int | None = None
    """Training reads only this many tokens of longer documents; `None` for all."""

    def __post_init__(self) -> None:
        require_choices(self)
        kind, colon, size = self.tokenizer.partition(":")
        if kind == "bpe" and colon and not size.isdecimal():
            msg = (
                "data.tokenizer must be 'bytes', a path or 'bpe:N' with a number of tokens, got "
                f"{self.tokenizer!r}."
            )
            raise ValueError(msg)

    @property
    def bpe_size(self) -> int | None:
        """Tokens to learn for `bpe:N`; `None` for the other tokenizers."""
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "bpe" and size.isdecimal() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How the validation documents are read."""

    memory_sizes: tuple[int, ...] | None = None
    """Sizes of the kNN memory to evaluate with, 0 for none; `None` for the model's own."""
    rows: int = 4
    """Documents read at the same time."""
    max_documents: int | None = None
    """Only the first so many documents; `None` for all."""
    max_tokens: int | None = None
    """Only the first so many tokens of each document; `None` for all."""
    short_tokens: int | None = None
    """Measure the first so many tokens of each document without kNN memory, too, and everything
    once before the first step: does a model that learns to use memory lose anything on short texts?
    `None` for neither."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rows", self.rows, 1),
            ("max_documents", self.max_documents, 1),
            # of two tokens one is predicted
            ("max_tokens", self.max_tokens, 2),
            ("short_tokens", self.short_tokens, 2),
        ):
            if value is not None:
                require_at_least(name, value, least)
        if any(size < 0 for size in self.memory_sizes or ()):
            msg = f"memory_sizes must be at least 0, got {list(self.memory_sizes or ())}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a training run depends on."""

    name: str
    """What the run is called."""
    model: ModelConfig | None = None
    """The decoder; `None` for a pretrained model."""
    pretrained: PretrainedConfig | None = None
    """The pretrained model, instead of a decoder."""
    data: DataConfig
    """Documents and tokenizer."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Batch, optimizer, checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.pretrained is None):
            got = "neither" if self.model is None else "both"
            msg = f"A run must have either a model or a pretrained one, got {got}. Set one to null."
            raise ValueError(msg)
        require_finite(self, but=MAY_BE_INFINITE)

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        if self.pretrained is not None:
            return self.pretrained.memory.segment_length
        assert self.model is not None
        return self.model.segment_length


def _values(config: DecoderConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(DecoderConfig)}


def require_at_least(name: str, value: int | float, least: int) -> None:
    """Refuse a number below the least, and NaN.

    Args:
        name: Of the field.
        value: Its value.
        least: The least.

    Raises:
        ValueError: If the value is not at least that.
    """
    if not value >= least:
        msg = f"{name} must be at least {least}, got {value}."
        raise ValueError(msg)
