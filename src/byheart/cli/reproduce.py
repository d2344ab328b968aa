"""`byheart reproduce`: figures of papers, computed again and compared."""

from collections.abc import Callable

import typer

from byheart.cli.reproduce_flops import flops
from byheart.cli.reproduce_generalization import generalization
from byheart.cli.reproduce_tasks import task_command

FIGURES: dict[str, Callable[..., None]] = {
    "flops": flops,
    "memorize": task_command(
        "memorize", "Accuracy of keeping a fact, by length (RMT report, Figures 1 and 6)."
    ),
    "detect": task_command(
        "detect", "Accuracy of finding and keeping a fact, by length (RMT report, Figures 1 and 6)."
    ),
    "reason": task_command(
        "reason", "Accuracy of answering by one of two facts, by length (RMT report, Figures 1, 6)."
    ),
    "generalization": generalization,
}
"""What can be reproduced: a command per name."""

group = typer.Typer(no_args_is_help=True, help="Compute the figures of papers again.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in FIGURES.items():
        group.command(name)(command)
    app.add_typer(group, name="reproduce")
