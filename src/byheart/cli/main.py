"""The `byheart` command."""

import io
import logging
import os
import sys
from typing import Annotated, Any

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
"""Exit code after Ctrl-C, or a signal that stopped training: that of shells."""


class _Commands(TyperGroup):
    """The commands, of which any can be stopped."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err_console.print("Stopped by Ctrl-C.")
        except TrainingInterruptedError as error:
            _show(error)
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
    """Run the command; exit code 0 is done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
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
    except (ByheartError, ValueError, TypeError, ImportError, OSError) as error:
        _show(error)
        sys.exit(1)


def _is_not_shown_elsewhere(record: logging.LogRecord) -> bool:
    # the hub's library has a handler of its own, and passes its warnings on nevertheless
    return not logging.getLogger(record.name.partition(".")[0]).handlers


def _show(error: Exception) -> None:
    from rich.markup import escape

    text = escape(str(error) or type(error).__name__)
    err_console.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
