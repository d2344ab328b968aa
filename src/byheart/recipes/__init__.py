"""Named configs for `byheart train`: Python functions that return a config."""

from collections.abc import Callable

from byheart.recipes.compare import compare_memory, compare_none, compare_xl
from byheart.recipes.demo import demo
from byheart.recipes.tasks import rmt_capacity, rmt_detect, rmt_memorize, rmt_reason
from byheart.recipes.text import attach, paper, text
from byheart.training.config import RunConfig
from byheart.training.task_config import TaskRunConfig

__all__ = ["RECIPES", "TASK_RECIPES"]

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "text": text,
    "paper": paper,
    "attach": attach,
    "compare-none": compare_none,
    "compare-xl": compare_xl,
    "compare-memory": compare_memory,
}
"""Recipes that learn documents; the first line of each docstring describes it."""

TASK_RECIPES: dict[str, Callable[[], TaskRunConfig]] = {
    "rmt-memorize": rmt_memorize,
    "rmt-detect": rmt_detect,
    "rmt-reason": rmt_reason,
    "rmt-capacity": rmt_capacity,
}
"""Recipes that learn a task with recurrent memory."""
