"""What a run depends on, and whether its parts fit together."""

from collections.abc import Mapping
from typing import Any

from byheart.config import to_dict
from byheart.data.rows import SegmentDataset
from byheart.training.config import TrainingConfig

__all__ = ["FREE_TO_CHANGE", "check_fit", "run_identity"]

# what may change when a run is resumed: it does not touch a step that is already done
FREE_TO_CHANGE = (
    "max_steps", "save_every", "keep_checkpoints", "evaluate_every", "log_every", "compile",
)  # fmt: skip


def run_identity(
    model: Mapping[str, Any],
    dataset: SegmentDataset,
    config: TrainingConfig,
    *,
    tokenizer_fingerprint: str,
    num_processes: int,
) -> dict[str, Any]:
    """Collect what a run depends on: a checkpoint may only continue a run where all of it agrees.

    Args:
        model: What the model is.
        dataset: The segments.
        config: How to train.
        tokenizer_fingerprint: Identifies the tokenizer.
        num_processes: Processes of the run.

    Returns:
        Nested dictionaries that JSON can hold.
    """
    training = to_dict(config)
    for name in FREE_TO_CHANGE:
        del training[name]
    return {
        "model": dict(model),
        "tokenizer": tokenizer_fingerprint,
        "training": training,
        "num_processes": num_processes,
        "documents": dataset.corpus.fingerprint,
        "schedule": dataset.plan.fingerprint,
    }


def check_fit(
    segment_length: int, dataset: SegmentDataset, config: TrainingConfig, num_processes: int
) -> None:
    """Refuse a dataset whose rows, steps or segments are not those of the run.

    Args:
        segment_length: Tokens of the model's segments.
        dataset: The segments.
        config: How to train.
        num_processes: Processes of the run.

    Raises:
        ValueError: If they do not fit together.
    """
    plan = dataset.plan
    num_rows = config.rows_per_device * num_processes * config.accumulation_steps
    if plan.num_rows != num_rows:
        msg = (
            f"The plan must have rows_per_device * processes * accumulation_steps = {num_rows} "
            f"rows, got {plan.num_rows}. Make it with RowPlan(..., num_rows={num_rows})."
        )
        raise ValueError(msg)
    if plan.num_steps < config.max_steps:
        msg = (
            f"The plan must have max_steps ({config.max_steps}) steps, got {plan.num_steps}. "
            f"Make it with RowPlan(..., num_steps={config.max_steps})."
        )
        raise ValueError(msg)
    if plan.segment_length != segment_length:
        msg = (
            f"The plan must have the model's segment_length {segment_length}, got "
            f"{plan.segment_length}."
        )
        raise ValueError(msg)
