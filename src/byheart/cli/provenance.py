"""What a result was made with: command, processor and versions."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("byheart", "torch", "transformers")


def provenance() -> dict[str, object]:
    """Say what a result of this process depends on besides its settings.

    Returns:
        The command line, the processor with its cores, and versions; for JSON.
    """
    return {
        "command": shlex.join(["byheart", *sys.argv[1:]]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """Name the processor; Python's own answer is empty on many Linux systems.

    Returns:
        Its name, or the machine's architecture.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
