"""Shared by the benchmarks: what the machine is, fair timing of contenders, results as JSON."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byheart.cli.provenance import processor


class Timing(NamedTuple):
    """Wall-clock seconds of one contender, one number per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_info(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the command, processor, threads, device and versions that a result depends on."""
    cuda = torch.cuda.is_available()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "load_average_before": load,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "numpy", "byheart", *packages)},
    }


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def time_pairs(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time contenders in turns, after one untimed round, so that a slow minute slows them all.

    On CUDA each call is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, call in contenders.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def time_on_device(call: Callable[[], object], seconds: float = 0.1) -> float:
    """Return the median seconds of a call on a CUDA device, from events around many calls.

    A call is repeated for as long as given, in up to 10 groups, after two that are not timed.
    """
    call()
    first = _seconds_of(call, 1)
    times = max(1, min(1000, int(seconds / 10 / first)))
    groups = max(3, min(10, int(seconds / (first * times))))
    return statistics.median(_seconds_of(call, times) for _ in range(groups))


def copy_rate() -> float:
    """Return the bytes that a large copy on the GPU reads and writes in a second."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_on_device(lambda: target.copy_(source))


def _seconds_of(call: Callable[[], object], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results, replacing the file only when they are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
