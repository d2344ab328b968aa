"""Small runs that learn a task, for the tests of this folder and of the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from byheart.training.task_config import (
    CurriculumConfig,
    EncoderConfig,
    MemoryPart,
    TaskEvaluationConfig,
    TaskPart,
    TaskRunConfig,
    TaskTrainingConfig,
)

_HERE = Path(__file__).parent


def task_part(**changes: Any) -> TaskPart:
    """A task in few stories, which need little time to tokenize."""
    settings = {
        "name": "memorize",
        "background": str(_HERE / "stories.txt"),
        "validation_background": str(_HERE / "other_stories.txt"),
    }
    return TaskPart(**(settings | changes))


def task_run(**changes: Any) -> TaskRunConfig:
    """A run whose stages are reached by chance: an accuracy of 4 % is enough.

    `changes` replace whole parts, or single fields of a part if they are dictionaries.
    """
    run = TaskRunConfig(
        name="tiny",
        task=task_part(),
        window=29,
        encoder=EncoderConfig(
            num_layers=1, embed_dim=12, num_heads=2, hidden_dim=11, vocab_size=1100, dropout=0.2
        ),
        memory=MemoryPart(num_memory_tokens=3, noise=0.1),
        curriculum=CurriculumConfig(
            max_segments=3,
            advance_accuracy=0.04,
            evaluate_every=4,
            evaluate_samples=40,
            stage_steps=8,
            continue_steps=3,
        ),
        training=TaskTrainingConfig(
            rows_per_device=4,
            save_every=3,
            log_every=5,
            warmup_steps=2,
            length_decay=0.5,
            average_decay=0.5,
        ),
        evaluation=TaskEvaluationConfig(segments=(1, 2, 5), samples=7, rows=3),
    )
    # together: `encoder` and `pretrained` exclude each other
    values = {
        name: replace(getattr(run, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return replace(run, **values)


def numbers_of(out: Path) -> dict[str, Any]:
    """What `result.json` holds, without times and memory."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    for entry in result["evaluation"]["measurements"]:
        for name in ("seconds", "tokens_per_second", "peak_memory_bytes"):
            del entry[name]
    return result
