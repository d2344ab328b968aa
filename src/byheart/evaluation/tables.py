"""Tables of results, for a report or a terminal."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

__all__ = ["Grid", "format_number", "markdown_table", "rich_table"]


class Grid(NamedTuple):
    """A table as texts."""

    title: str
    """What it shows."""
    header: tuple[str, ...]
    """Names of the columns."""
    rows: Sequence[tuple[str, ...]]
    """One text per column."""


def markdown_table(grid: Grid) -> str:
    """Lay a table out for a report.

    Returns:
        Markdown, with all columns aligned to the right.
    """
    rule = tuple("---:" for _ in grid.header)
    lines = [f"| {' | '.join(row)} |" for row in (grid.header, rule, *grid.rows)]
    return "\n".join([f"**{grid.title}**", "", *lines, ""])


def rich_table(grid: Grid) -> Table:
    """Lay a table out for a terminal.

    Returns:
        The table, for `rich.print`.
    """
    table = Table(title=grid.title, box=box.SIMPLE_HEAD)
    for name in grid.header:
        # words wrap in a narrow terminal, but are not cut
        table.add_column(name, justify="right", no_wrap=" " not in name)
    for row in grid.rows:
        table.add_row(*row)
    return table


def format_number(value: float | None, spec: str) -> str:
    """Format a number that may be missing.

    Returns:
        The number, or a dash for `None`.
    """
    return "-" if value is None else format(value, spec)
