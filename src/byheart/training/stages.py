"""The model as it was when each stage of a curriculum was reached, below the run's directory."""

import shutil
from collections.abc import Collection
from pathlib import Path

from byheart.memory.files import MANIFEST

__all__ = ["STAGES", "kept_stages", "remove_stages", "stage_directory"]

STAGES = "stages"


def stage_directory(run: Path, num_segments: int) -> Path:
    """Name the directory of a stage.

    Returns:
        Where its model is, if it was kept.
    """
    return run / STAGES / str(num_segments)


def kept_stages(run: Path) -> tuple[int, ...]:
    """Find the stages of a run whose models were kept.

    Args:
        run: The run's directory; the run may be unfinished.

    Returns:
        Segments of each stage, ascending.
    """
    # what is being written, or was cut short, has a name with a dot
    found = (run / STAGES).glob("*")
    return tuple(sorted(int(path.name) for path in found if path.name.isdecimal()))


def remove_stages(run: Path, *, but: Collection[int]) -> None:
    """Remove the models of stages.

    Args:
        run: The run's directory.
        but: Stages that stay.
    """
    for num_segments in kept_stages(run):
        if num_segments not in but:
            path = stage_directory(run, num_segments)
            # without its manifest a half removed model cannot be taken for a complete one
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
