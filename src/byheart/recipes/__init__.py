"""Named configs for `byheart train`: Python functions that return a `RunConfig`."""

from collections.abc import Callable

from byheart.recipes.compare import compare_memory, compare_none, compare_xl
from byheart.recipes.demo import demo
from byheart.recipes.text import paper, text
from byheart.training.config import RunConfig

__all__ = ["RECIPES"]

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "text": text,
    "paper": paper,
    "compare-none": compare_none,
    "compare-xl": compare_xl,
    "compare-memory": compare_memory,
}
"""Recipes by name; the first line of each function's docstring describes it."""
