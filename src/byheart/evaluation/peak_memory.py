"""The most memory that a piece of work has used."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """What `peak_memory` has found."""

    num_bytes: int | None = None
    """On a GPU: the most that torch has allocated there. On a CPU: the most memory that the process
    has had resident, with everything else it holds. `None` where the system does not say."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of what is done inside.

    Args:
        device: Where it is done.

    Yields:
        The result, filled in at the end.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    is_reset = _reset_resident_peak()
    yield peak
    peak.num_bytes = _resident_peak() if is_reset else None


def _reset_resident_peak() -> bool:
    # Linux: 5 sets the peak to what is resident now
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
