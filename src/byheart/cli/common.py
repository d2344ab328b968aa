"""What all commands share: results, errors, progress, finding a model, options for documents."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypedDict, cast

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from byheart.config import write_text_atomic
from byheart.data.documents import FolderAs, OnBad
from byheart.data.token_cache import TokenizeProgress
from byheart.data.tokenize import Tokenizer, load_tokenizer
from byheart.errors import CheckpointError
from byheart.models.checkpoint import load_model
from byheart.models.segment_model import SegmentModel

err_console = Console(stderr=True)
"""Where progress and messages go: standard output belongs to results."""


FolderAsOption = Annotated[
    str | None, typer.Option("--folder-as", help="One document of a folder is a: file or folder.")
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Skip records that cannot be read, with a warning.")
]
TextKeyOption = Annotated[
    str | None, typer.Option("--text-key", help="Key of the text in JSON lines; default: text.")
]
SuffixOption = Annotated[
    list[str] | None,
    typer.Option("--suffix", help="Of a folder only files that end so: .py. Repeatable."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:1; default: a GPU if there is.")
]

RunKind: TypeAlias = Literal["documents", "task", "pretrained"]
"""What a directory holds: a run that learns documents or a task, or a Hugging Face model."""

# the file that only pretrained models with memory have
_PRETRAINED = "memory_config.json"


class ReadingOptions(TypedDict, total=False):
    """How to read documents, as far as the user has said so."""

    on_bad: OnBad
    folder_as: FolderAs
    text_key: str
    suffixes: tuple[str, ...]


class TrainedModel(NamedTuple):
    """What a training run has left."""

    model: SegmentModel
    tokenizer: Tokenizer
    run_dir: Path


def print_json(result: object) -> None:
    """Write a result for other programs to standard output; NaN and infinities become null.

    It is written whole or not at all, and with escapes where the output is not UTF-8.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    escape = encoding not in ("utf-8", "utf8")
    text = json.dumps(_finite(result), indent=2, ensure_ascii=escape, allow_nan=False)
    sys.stdout.write(text + "\n")


def reading_options(
    folder_as: str | None, skip_bad: bool, text_key: str | None, suffix: list[str] | None
) -> ReadingOptions:
    """Collect the options that say how documents are read.

    Returns:
        Those that the user gave, for `iter_documents`, `tokenize_corpus` or a `DataConfig`.

    Raises:
        BadParameter: If `folder_as` is neither of its two values.
    """
    options = ReadingOptions()
    if folder_as is not None:
        if folder_as not in ("file", "folder"):
            msg = f"--folder-as must be file or folder, got {folder_as!r}."
            raise typer.BadParameter(msg)
        options["folder_as"] = cast("FolderAs", folder_as)
    if skip_bad:
        options["on_bad"] = "skip"
    if text_key is not None:
        options["text_key"] = text_key
    if suffix:
        options["suffixes"] = tuple(suffix)
    return options


def find_device(name: str | None) -> torch.device:
    """Choose where a model runs.

    Args:
        name: What the user asked for; `None` for a GPU if there is one.

    Returns:
        The device.

    Raises:
        BadParameter: If there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    # torch raises AssertionError where it was built without the device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"--device must be a device of this machine, got {name!r}: {error}"
        raise typer.BadParameter(msg) from error
    return device


def open_run(run_dir: Path, device: torch.device) -> TrainedModel:
    """Load the model and the tokenizer of a training run.

    Args:
        run_dir: Directory that `byheart train` wrote.
        device: Where the model shall live.

    Returns:
        Model in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: If the run is not finished, has learned a task, or model and tokenizer do
            not belong together.
    """
    kind = run_kind(run_dir / "config.json")
    if kind == "task":
        msg = (
            f"{run_dir} must hold a run that has learned documents, and holds one that has learned "
            f"a task. Measure it with: byheart evaluate-task {run_dir}"
        )
        raise CheckpointError(msg)
    if not (run_dir / "model").is_dir():
        hint = "Pass the --out directory of byheart train."
        if kind == "documents":
            hint = (
                f"Finish it with: byheart train {run_dir / 'config.json'} --out {run_dir} --resume"
            )
        elif kind == "pretrained":
            hint = (
                "It holds a Hugging Face model, which has no memory yet. Train one on it, and pass "
                f"the --out directory: byheart train attach --model {run_dir} --data DOCUMENTS"
            )
        msg = f"{run_dir} must hold a finished run with model/ and tokenizer/. {hint}"
        raise CheckpointError(msg)
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"))
    fingerprint = tokenizer.fingerprint
    model: SegmentModel
    if (run_dir / "model" / _PRETRAINED).is_file():
        # brings transformers, which a decoder need not wait for
        from byheart.adapters.memory_saving import load_attached

        attached = load_attached(None, run_dir / "model", tokenizer_fingerprint=fingerprint)
        model = attached.to(device)
    else:
        model = load_model(run_dir / "model", tokenizer_fingerprint=fingerprint, device=device)
    return TrainedModel(model, tokenizer, run_dir)


def prepare_output(directory: Path) -> None:
    """Make a directory and write into it, so that what hours of work find can be kept.

    Args:
        directory: For results.

    Raises:
        BadParameter: If it cannot be made or written to.
    """
    trial = directory / ".byheart-trial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text_atomic(trial, "")
        trial.unlink(missing_ok=True)
    except OSError as error:
        msg = (
            f"The directory of results must be one that can be written to, got {directory}: "
            f"{error}. Nothing was computed. Name another with --out."
        )
        raise typer.BadParameter(msg) from error


def parse_size(text: str, option: str = "--memory-size") -> int:
    """Read a size, such as `8192` or `64K`.

    Args:
        text: What was given.
        option: Where, for the message.

    Returns:
        The number; K and M are powers of 1024.

    Raises:
        BadParameter: If it is no size, or more than one.
    """
    try:
        (size,) = parse_sizes(text)
    except ValueError as error:
        msg = f"{option} must be one size such as 8192 or 64K, got {text!r}."
        raise typer.BadParameter(msg) from error
    return size


def run_kind(config: Path) -> RunKind | None:
    """Tell by its config what a directory holds.

    Args:
        config: The file; it may be missing or anything else.

    Returns:
        What is there; `None` for a file that is missing, cannot be read or is no such config.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    if "model_type" in content:
        return "pretrained"
    if "task" in content:
        return "task"
    return "documents" if "data" in content or "model" in content else None


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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
