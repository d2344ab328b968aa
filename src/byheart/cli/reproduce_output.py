"""What every reproduced figure leaves: a result, a table and a plot."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from byheart.cli.common import err_console, print_json
from byheart.cli.provenance import provenance
from byheart.config import write_text_atomic

OutOption = Annotated[Path, typer.Option(help="Directory for result, table and plot.")]
TasksOutOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory for runs, result, table and plot; default: reproduce/NAME, and "
        "reproduce/NAME-quick with --quick."
    ),
]
PlotOption = Annotated[bool, typer.Option(help="Draw the figure.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def write_output(
    directory: Path,
    name: str,
    result: Mapping[str, object],
    table: str,
    draw: Callable[[Path], Path] | None,
) -> list[Path]:
    """Write what was computed as NAME.json, with what made it, NAME.md and NAME.png.

    Args:
        directory: Where to; `prepare_output` has made it before anything was computed.
        name: Of the figure.
        result: Everything computed, for JSON.
        table: The same in short, in Markdown.
        draw: Writes the plot to a path; `None` for no plot. Without matplotlib there is none.

    Returns:
        The files, in this order.
    """
    files = [directory / f"{name}.json", directory / f"{name}.md"]
    content = {**result, "made_by": provenance()}
    write_text_atomic(files[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text_atomic(files[1], table)
    if draw is not None:
        try:
            files.append(draw(directory / f"{name}.png"))
        except ImportError as error:
            err_console.print(f"No plot: {error}", highlight=False)
    return files


def show_output(
    result: Mapping[str, object], table: str, files: Sequence[Path], *, as_json: bool
) -> None:
    """Print the table and the files that were written, or all as JSON.

    Args:
        result: Everything computed.
        table: The same in short.
        files: What was written.
        as_json: Whether to print JSON.
    """
    if as_json:
        print_json({**result, "files": [str(path) for path in files]})
        return
    print(table)
    for path in files:
        print(path)
