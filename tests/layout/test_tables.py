"""The tables of benchmarks/README.md are those of the committed results."""

import subprocess
import sys
from pathlib import Path

from benchmarks import tables

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_results(tmp_path):
    shown = ROOT / "benchmarks" / "README.md"
    script = "import sys, pathlib; from benchmarks import tables; sys.stdout.write(tables.render())"
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert made == shown.read_text(encoding="utf-8")


def test_what_is_said_of_the_gates_is_that_of_the_runs(monkeypatch):
    way = dict.fromkeys(("loss_of_the_last_fourth", "nats_with_memory", "nats_without_memory"), 2.0)
    memory = {"segment_length": 64, "xl_cache_length": 32, "knn": {"age_slope": 0.25}}
    there = {
        "gates/summary.json": {
            "machine": {}, "none": {"steps": 4000, "num_parameters": 1_234_567},
            "ways": {"tanh gate": way},
        },
        "gates/tanh-gate.config.json": {
            "training": {"max_steps": 160, "gate_learning_rate_factor": 2.5},
            "pretrained": {"memory": memory},
        },
    }  # fmt: skip
    monkeypatch.setattr(tables, "read", there.get)
    monkeypatch.setattr(tables, "machine_line", lambda _: "")
    section = tables.gates_section()
    assert "1.2M parameters" in section
    assert "4,000 steps without a memory (segments of 64, XL cache of 32)" in section
    assert "fine-tuned with one for 160 steps" in section
    assert "rate of the gates 2.5 times the model's" in section
    assert "age slope 0.25" in section
