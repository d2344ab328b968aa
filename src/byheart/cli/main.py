"""The `byheart` command."""

import io
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

import byheart
from byheart.cli import (
    data,
    doctor,
    evaluate,
    flops,
    generate,
    reproduce,
    task,
    tokenizer,
    train,
)
from byheart.cli.common import err_console
from byheart.errors import ByheartError
from byheart.training.stop import TrainingInterruptedError

STOPPED = 130
"""Exit code after Ctrl-C or SIGTERM: that of shells."""

_EXPLAINED = (ByheartError, ValueError, TypeError, ImportError, OSError)
# what torch says besides its own type of error, also of sizes that no memory can have
_TOO_LITTLE_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory",
    "Storage size calculation overflowed", "Overflow when unpacking long",
)  # fmt: skip


class _Commands(TyperGroup):
    """The commands, of which any can be stopped."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            err_console.print(f"Stopped by {str(stop) or 'Ctrl-C'}.")
        except TrainingInterruptedError as error:
            _show(str(error))
        raise typer.Exit(STOPPED)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Long memory for transformers: kNN memory, XL cache and recurrent memory.",
    epilog=f"Exit codes: 0 done, 1 failed, 2 wrong usage, {STOPPED} stopped by Ctrl-C or a signal.",
)
for module in (train, evaluate, task, generate, tokenizer, data, doctor, flops, reproduce):
    module.register(app)


def _print_version(value: bool) -> bool:
    if value:
        print(f"byheart {byheart.__version__}")
        raise typer.Exit
    return value


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Long memory for transformers."""


def main() -> None:
    """Run the command; exit code 0 is done, 1 failed, 2 wrong usage, 130 stopped."""
    if threading.current_thread() is threading.main_thread():
        # training has a way of its own to stop: with a checkpoint
        signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a character shows another one in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        # bars of transformers and of the hub; read when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.addFilter(_is_not_shown_elsewhere)
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler]
    )
    try:
        # exits by itself, but for failures
        app()
    except (*_EXPLAINED, MemoryError, OverflowError, RuntimeError) as error:
        text = _explanation(error)
        if text is None:
            raise
        _show(text)
        sys.exit(1)


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _is_not_shown_elsewhere(record: logging.LogRecord) -> bool:
    # the hub's library has a handler of its own, and passes its warnings on nevertheless
    return not logging.getLogger(record.name.partition(".")[0]).handlers


def _explanation(error: Exception) -> str | None:
    """Say what has failed.

    Returns:
        What a user can act on; `None` for what only a traceback explains.
    """
    text = str(error) or type(error).__name__
    # torch goes on with what its own developers want to know
    first_line = text.splitlines()[0].rstrip(".")
    if _is_too_little_memory(error, text):
        return (
            f"There must be enough memory for what was asked for, got: {first_line}. Lower "
            "--memory-size, the number of rows or the length of a segment."
        )
    if isinstance(error, OverflowError):
        return (
            f"Numbers must be small enough to compute with, got: {first_line}. Lower those that "
            "were given."
        )
    return text if isinstance(error, _EXPLAINED) else None


def _is_too_little_memory(error: Exception, text: str) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    is_from_torch = isinstance(error, (RuntimeError, TypeError))
    is_ours = isinstance(error, ByheartError)
    return is_from_torch and not is_ours and any(words in text for words in _TOO_LITTLE_MEMORY)


def _show(text: str) -> None:
    from rich.markup import escape

    err_console.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
