"""`byheart reproduce`: figures of papers, computed again and compared."""

from collections.abc import Callable

import typer

from byheart.cli.reproduce_flops import flops
from byheart.cli.reproduce_generalization import generalization
from byheart.cli.reproduce_tasks import detect, memorize, reason

FIGURES: dict[str, Callable[..., None]] = {
    "flops": flops,
    "memorize": memorize,
    "detect": detect,
    "reason": reason,
    "generalization": generalization,
}
"""What can be reproduced: a command per name."""

group = typer.Typer(no_args_is_help=True, help="Compute the figures of papers again.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in FIGURES.items():
        group.command(name)(command)
    app.add_typer(group, name="reproduce")
