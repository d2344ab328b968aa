"""What is measured during training, and the file it is written to."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from byheart.errors import DataError
from byheart.memory.state import MemoryState

__all__ = ["Meter", "MetricsFile", "memory_fill", "plain_number"]


# sums of `Meter`: nats, predicted tokens, tokens read since the beginning of the run, shares of the
# memory that were rewritten, and their number; and tokens read since the clock was started
_TOTAL, _SHARES, _READ = 2, slice(3, 5), 5


class Meter:
    """Sums over the steps since the last log line, on one process.

    The sums are float64 tensors on the training device, so that adding to them waits for nothing,
    and they are part of a checkpoint: a line that spans an interruption says what it would have
    said without. Only its rate is that of the steps since the interruption.

    Args:
        device: Where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.restart_clock()

    def add(self, nats: Tensor, num_predicted: Tensor, num_read: Tensor) -> None:
        """Count a micro-batch.

        Args:
            nats: Summed negative log likelihood of its predicted tokens.
            num_predicted: Predicted tokens.
            num_read: Real input tokens.
        """
        self.sums[: _TOTAL + 1] += torch.stack([nats.detach().double(), num_predicted, num_read])
        self.sums[_READ] += num_read

    def add_write_share(self, share: Tensor) -> None:
        """Count how much of the memory a micro-batch has rewritten.

        Args:
            share: Of the memory, mean over its documents.
        """
        share = share.detach().double()
        self.sums[_SHARES] += torch.stack([share, torch.ones_like(share)])

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Turn the sums into metrics and start the next line.

        Args:
            add_up: Adds a tensor up over all processes.

        Returns:
            Mean loss per predicted token in nats, tokens read since the beginning, tokens read per
            second and, where it was counted, the mean share of the memory that was rewritten, over
            all processes.
        """
        nats, predicted, total, shares, num_shares, read = add_up(self.sums.clone()).tolist()
        seconds = time.perf_counter() - self._since
        self.sums[:_TOTAL] = 0
        self.sums[_TOTAL + 1 :] = 0
        self.restart_clock()
        metrics = {
            "loss": nats / predicted if predicted else math.nan,
            "num_tokens": int(total),
            "tokens_per_second": read / seconds,
        }
        return metrics | ({"write_share": shares / num_shares} if num_shares else {})

    def restart_clock(self) -> None:
        """Count seconds from now on."""
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that something other than training takes."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - before

    def state(self) -> Float64[Tensor, " 5"]:
        """Return what a checkpoint keeps."""
        # the clock does not go on from there, so neither does what was read by it
        return self.sums[:_READ].cpu().clone()

    def load_state(self, sums: Float64[Tensor, " sum"]) -> None:
        """Go on from a checkpoint. The clock must be restarted when steps begin.

        Args:
            sums: What `state` returned.
        """
        if len(sums) == 4:
            # from before shares were kept: the third are tokens of the rate
            sums = sums[[0, 1, 3]]
        self.sums.zero_()
        self.sums[: len(sums)] = sums


def memory_fill(states: list[MemoryState]) -> float | None:
    """Tell how full the kNN memories are.

    Args:
        states: The states of one process.

    Returns:
        Share of the slots that hold an entry, mean over rows; `None` without a kNN memory.
    """
    shares = [
        (store.num_written.clamp(max=store.memory_size) / store.memory_size).mean()
        for state in states
        for store in list(state.stores.values())[:1]
    ]
    return torch.stack(shares).mean().item() if shares else None


class MetricsFile:
    """JSON lines, one per log: `step`, and numbers as Python prints them, not rounded.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line. It survives the death of the process.

        Args:
            step: Optimizer steps done.
            values: Numbers by name; NaN and infinities become strings.
        """
        line = {"step": step} | {name: plain_number(value) for name, value in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Wait until the lines survive a power failure."""
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Drop what was logged after a step, and a line that was cut short.

        Args:
            step: The last step to keep.
        """
        if not self.path.exists():
            return
        kept = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                kept += len(line)
        os.truncate(self.path, kept)

    def read(self) -> list[dict[str, Any]]:
        """Read all lines.

        Returns:
            One dictionary per line.

        Raises:
            DataError: If a line is not JSON.
        """
        if not self.path.exists():
            return []
        try:
            return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            msg = f"{self.path} must hold one JSON object per line: {error}. Remove the line."
            raise DataError(msg) from error


def plain_number(value: Any) -> Any:
    """Spell NaN and infinities, which JSON does not have, as strings that `float` reads.

    Returns:
        Such a string, or the value as it is.
    """
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
