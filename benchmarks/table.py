"""Results as Markdown tables: what all sections of benchmarks/README.md share."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def read(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return (
        f"`{machine['command']}` on {machine['cores']} cores of {machine['processor']} "
        f"({machine['cpu_capability']}), {machine['date']}; {versions}."
    )


def gpu_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return (
        f"`{machine['command']}` on one {machine['gpu']} and {machine['cores']} cores of "
        f"{machine['processor']}, {machine['date']}; {versions}."
    )
