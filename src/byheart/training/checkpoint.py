"""Checkpoints that are either complete or refused, and that only continue the run they belong to.

A checkpoint is the directory `checkpoint-N` below the run's directory:

============================== ===================================================================
file                           content
============================== ===================================================================
model/                         weights and config, as `byheart.models.checkpoint` writes them
optimizer.pt, scheduler.pt     as the Hugging Face Trainer writes them
rng_state*.pth                 random states, one file per process
trainer_state.json             steps done
memory_rankN.safetensors       what the rows of process N remember, and its unfinished log line
positions.json                 which segment of which document each row has read last
manifest.json                  sizes and checksums, what the run depends on; written last
============================== ===================================================================
"""

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from byheart.config import load_config, to_dict
from byheart.errors import CheckpointError
from byheart.memory.files import MANIFEST, read_manifest, require_format, write_manifest
from byheart.memory.persistence import state_tensors, with_tensors
from byheart.memory.state import MemoryState

__all__ = [
    "CONFIG",
    "MODEL",
    "RESULT",
    "Checkpoint",
    "checkpoint_directory",
    "clear_checkpoint",
    "complete_checkpoint",
    "differences",
    "explained_write_errors",
    "find_checkpoint",
    "find_start",
    "has_checkpoints",
    "load_memory",
    "remove_checkpoints",
    "rotate_checkpoints",
    "save_memory",
]

_LOGGER = logging.getLogger(__name__)
FORMAT = "byheart-training-checkpoint"
FORMAT_VERSION = 1
CONFIG, MODEL, RESULT = "config.json", "model", "result.json"
POSITIONS = "positions.json"
_PREFIX = "checkpoint-"
# by these names the errors of torch.save can be told from its others
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream", "cannot be opened")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    """Its directory."""
    step: int
    """Optimizer steps done."""
    identity: Mapping[str, Any]
    """What the run depends on, as nested dictionaries."""

    def require_same(self, identity: Mapping[str, Any]) -> None:
        """Refuse to be continued by another run.

        Args:
            identity: What the run that wants to go on depends on.

        Raises:
            CheckpointError: If anything differs.
        """
        differing = differences(self.identity, identity)
        if differing:
            msg = (
                f"Checkpoint {self.path} was made with {_listed(differing)}. Resume with what the "
                "checkpoint was made with, or start anew with another directory or overwrite=True."
            )
            raise CheckpointError(msg)

    def positions(self) -> Any:
        """Return what each row has read last, as `SegmentDataset.positions_at` gives it."""
        return json.loads((self.path / POSITIONS).read_text(encoding="utf-8"))["rows"]


def checkpoint_directory(run: Path, step: int) -> Path:
    """Name the checkpoint of a step.

    Returns:
        Its directory.
    """
    return run / f"{_PREFIX}{step}"


def find_checkpoint(run: Path) -> Checkpoint:
    """Find the newest complete checkpoint of a run.

    Newer ones that are incomplete or damaged are named in a logged warning and left alone.

    Args:
        run: The run's directory.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    refusals = []
    for step, path in reversed(_directories(run)):
        found = _open(path, step)
        if isinstance(found, Checkpoint):
            return found
        refusals.append(str(found))
        _LOGGER.warning("Checkpoint %s is not used: %s", path.name, found)
    reasons = " ".join(refusals) or "There is none at all."
    msg = (
        f"To resume, {run} must hold a complete checkpoint. {reasons} Start anew with "
        "overwrite=True (--overwrite), or with another directory."
    )
    raise CheckpointError(msg)


def find_start(run: Path, config: object, free: Collection[str]) -> Checkpoint | None:
    """Find where a run goes on: its newest complete checkpoint, or step 0.

    A run that was killed before its first checkpoint was complete has lost nothing by starting at
    step 0, which a logged warning says. One whose checkpoints are gone or damaged is refused.

    Args:
        run: The run's directory.
        config: Of the run that wants to go on.
        free: Dotted names in it that may have changed.

    Returns:
        The checkpoint; `None` for step 0.

    Raises:
        CheckpointError: If there is nothing to go on with, or the directory was begun with another
            config.
    """
    finished = any((run / name).exists() for name in (MODEL, RESULT))
    complete = any((path / MANIFEST).is_file() for _, path in _directories(run))
    if finished or complete or not (run / CONFIG).is_file():
        return find_checkpoint(run)
    saved = to_dict(load_config(type(config), run / CONFIG))
    differing = [
        (name, before, now)
        for name, before, now in differences(saved, to_dict(config))
        if not any(name == one or name.startswith(f"{one}.") for one in free)
    ]
    if differing:
        msg = (
            f"{run} has no checkpoint yet and was begun with {_listed(differing)}. Resume with "
            "what it was begun with, or start anew with another directory or overwrite=True "
            "(--overwrite)."
        )
        raise CheckpointError(msg)
    _LOGGER.warning("%s has no complete checkpoint yet: the run starts again at step 0.", run)
    return None


def has_checkpoints(run: Path) -> bool:
    """Tell whether a run has checkpoints, complete or not.

    Returns:
        `True` if it has.
    """
    return bool(_directories(run))


def clear_checkpoint(path: Path) -> None:
    """Make an empty directory for a checkpoint, removing what a killed process left there."""
    _remove(path)
    path.mkdir(parents=True)


def complete_checkpoint(path: Path, identity: Mapping[str, Any], positions: Any) -> None:
    """Add positions and manifest to the files of a checkpoint, which makes it complete.

    Args:
        path: The checkpoint; all other files are written.
        identity: What the run depends on.
        positions: What each row has read last.
    """
    text = json.dumps({"rows": positions}, indent=1)
    (path / POSITIONS).write_text(text, encoding="utf-8")
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": identity}
    write_manifest(path, content)


def rotate_checkpoints(run: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints, and all that were cut short.

    Args:
        run: The run's directory; its newest checkpoint is complete.
        keep: Complete checkpoints that stay.
    """
    paths = [path for _, path in _directories(run)]
    complete = [path for path in paths if (path / MANIFEST).is_file()]
    for path in paths:
        if path not in complete[-keep:]:
            _remove(path)


def remove_checkpoints(run: Path, *, after: int = -1, but: int | None = None) -> None:
    """Remove checkpoints of a run.

    Args:
        run: The run's directory.
        after: Only those of later steps; by default all.
        but: Step of one that stays.
    """
    for step, path in _directories(run):
        if step > after and step != but:
            _remove(path)


def save_memory(
    path: Path, states: list[MemoryState], sums: Float64[Tensor, " sum"], process: int
) -> None:
    """Write what the rows of a process remember.

    Args:
        path: The checkpoint.
        states: One per accumulated micro-batch.
        sums: The unfinished log line.
        process: Index of the process.
    """
    tensors = {"meter": sums}
    for index, state in enumerate(states):
        # copies are made on the CPU, where there is room for a second large memory
        flat = state_tensors(state)
        tensors |= {f"micro_batch{index}.{name}": tensor for name, tensor in flat.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, _memory_file(path, process))


def load_memory(
    path: Path, empty: list[MemoryState], process: int
) -> tuple[list[MemoryState], Float64[Tensor, " sum"]]:
    """Read what `save_memory` wrote.

    Args:
        path: The checkpoint.
        empty: Fresh states of the same shape; they are used up.
        process: Index of the process.

    Returns:
        The states, and the unfinished log line.

    Raises:
        CheckpointError: If there is no such file or it cannot be read.
    """
    file = _memory_file(path, process)
    try:
        # the states move theirs; a second large memory may have no room on the training device
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        msg = f"{file} cannot be read: {error}. Resume from another checkpoint."
        raise CheckpointError(msg) from error
    states = []
    for index, state in enumerate(empty):
        prefix = f"micro_batch{index}."
        mine = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        states.append(with_tensors(state, mine))
    return states, tensors["meter"]


@contextmanager
def explained_write_errors(path: Path, *, is_begun: bool = True) -> Iterator[None]:
    """Turn a failed write, whatever library reports it, into one clear error.

    Other errors, such as a lack of memory, pass unchanged.

    Args:
        path: What is being written. A directory is removed again if it is incomplete, which may
            free the disk.
        is_begun: Whether there is a run to go on with.

    Yields:
        Nothing.

    Raises:
        CheckpointError: If writing fails.
    """
    try:
        yield
    except Exception as error:
        if path.is_dir() and not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
        # what byheart writes elsewhere is already explained, for its own path
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if not _is_failed_write(cause):
            raise
        remedy = (
            "; then go on from the last complete checkpoint with resume=True (--resume)."
            if is_begun
            else ", or choose another directory (--out)."
        )
        msg = (
            f"{path} could not be written: {cause}. See that the disk has room "
            f"({_free_space(path)} free) and may be written to{remedy}"
        )
        raise CheckpointError(msg) from error


def differences(saved: object, mine: object, path: str = "") -> list[tuple[str, object, object]]:
    """Compare nested dictionaries.

    Args:
        saved: One side.
        mine: The other.
        path: Dotted name of both, for the result.

    Returns:
        Dotted name and both values of all that differs.
    """
    if not (isinstance(saved, Mapping) and isinstance(mine, Mapping)):
        return [] if saved == mine else [(path, saved, mine)]
    return [
        difference
        for key in dict.fromkeys([*saved, *mine])
        for difference in differences(
            saved.get(key), mine.get(key), f"{path}.{key}" if path else str(key)
        )
    ]


def _listed(differing: list[tuple[str, object, object]]) -> str:
    return "; ".join(
        f"{name} {_shown(saved)}, this run has {_shown(mine)}" for name, saved, mine in differing
    )


def _shown(value: object) -> str:
    # hashes are long, and their beginnings differ
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def _is_failed_write(error: BaseException | None) -> bool:
    # torch's zip writer raises RuntimeError, as do a lack of memory and broken connections
    return isinstance(error, (OSError, SafetensorError)) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER)
    )


def _memory_file(path: Path, process: int) -> Path:
    return path / f"memory_rank{process}.safetensors"


def _directories(run: Path) -> list[tuple[int, Path]]:
    numbered = [
        (int(number), path)
        for path in run.glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdecimal() and path.is_dir()
    ]
    return sorted(numbered)


def _remove(path: Path) -> None:
    # without its manifest a half removed checkpoint cannot be taken for a complete one
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _open(path: Path, step: int) -> Checkpoint | CheckpointError:
    try:
        manifest = read_manifest(path)
        require_format(manifest, path, FORMAT, FORMAT_VERSION)
    except CheckpointError as error:
        return error
    return Checkpoint(path=path, step=step, identity=manifest["identity"])


def _free_space(path: Path) -> str:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB"
