"""What all commands share: results on standard output, errors, progress, finding a model."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from byheart.data.token_cache import TokenizeProgress
from byheart.data.tokenize import Tokenizer, load_tokenizer
from byheart.errors import CheckpointError
from byheart.models.checkpoint import load_model
from byheart.models.decoder import Decoder

err_console = Console(stderr=True)
"""Where progress and messages go: standard output belongs to results."""


class TrainedModel(NamedTuple):
    """What a training run has left."""

    decoder: Decoder
    tokenizer: Tokenizer
    run_dir: Path


def print_json(result: object) -> None:
    """Write a result for other programs to standard output."""
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def open_run(run_dir: Path) -> TrainedModel:
    """Load the model and the tokenizer of a training run.

    Args:
        run_dir: Directory that `byheart train` wrote.

    Returns:
        Decoder in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: If the run is not finished, or model and tokenizer do not belong together.
    """
    if not (run_dir / "model").is_dir():
        hint = (
            f"Finish it with: byheart train {run_dir / 'config.json'} --out {run_dir} --resume"
            if (run_dir / "config.json").is_file()
            else "Pass the --out directory of byheart train."
        )
        msg = f"{run_dir} must hold a finished run with model/ and tokenizer/. {hint}"
        raise CheckpointError(msg)
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"))
    decoder = load_model(run_dir / "model", tokenizer_fingerprint=tokenizer.fingerprint)
    return TrainedModel(decoder, tokenizer, run_dir)


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """Show a bar with rate and time left on standard error, if that is a terminal.

    Args:
        unit: What is counted.

    Yields:
        The bar; add tasks to it.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]} " + unit + "/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, disable=not err_console.is_terminal) as bar:
        yield bar


class Bar:
    """One task of a progress bar, moved by absolute counts."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None
        self._description = ""

    def move(self, description: str, done: int, total: int) -> None:
        """Show how far the task is; another description begins another bar."""
        if self._task is None or description != self._description:
            self._task = self._bar.add_task(description, total=total, rate="-")
            self._description = description
        speed = self._bar.tasks[self._task].speed
        self._bar.update(
            self._task, completed=done, total=total, rate=f"{speed:,.0f}" if speed else "-"
        )


@contextmanager
def tokenize_progress() -> Iterator[Callable[[TokenizeProgress], None]]:
    """Show how far tokenizing a corpus is.

    Yields:
        What to pass as `on_progress` to `tokenize_corpus`.
    """
    with progress_bar("bytes") as progress:
        bar = Bar(progress)
        yield lambda now: bar.move(now.stage, now.num_bytes, now.total_bytes or now.num_bytes)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read a list such as `0,2048,8K,1M`.

    Returns:
        The numbers; K and M are powers of 1024.

    Raises:
        ValueError: If an item is no size.
    """
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for item in text.split(","):
        number, unit = item.strip().upper(), 1
        if number[-1:] in units:
            number, unit = number[:-1], units[number[-1]]
        if not number.isdecimal():
            msg = f"Sizes must be whole numbers such as 0,2048,8K, got {item.strip()!r}."
            raise ValueError(msg)
        sizes.append(int(number) * unit)
    return tuple(sizes)
