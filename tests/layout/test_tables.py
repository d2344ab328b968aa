"""The tables of benchmarks/README.md are those of the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_results(tmp_path):
    shown = ROOT / "benchmarks" / "README.md"
    script = "import sys, pathlib; from benchmarks import tables; sys.stdout.write(tables.render())"
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert made == shown.read_text(encoding="utf-8")
