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


def test_the_rate_of_the_gates_is_that_of_the_runs(monkeypatch):
    way = dict.fromkeys(("loss_of_the_last_fourth", "nats_with_memory", "nats_without_memory"), 2.0)
    config = {
        "training": {"max_steps": 160, "gate_learning_rate_factor": 10.0},
        "pretrained": {"memory": {"knn": {"age_slope": 0.25}}},
    }
    there = {
        "gates/summary.json": {"machine": {}, "ways": {"tanh gate": way}},
        "finetune/tuned.config.json": config,
    }
    monkeypatch.setattr(tables, "read", there.get)
    monkeypatch.setattr(tables, "machine_line", lambda _: "")
    section = tables.gates_section()
    assert "fine-tuned for 160 steps" in section
    assert "rate of the gates 10 times the model's" in section
    assert "age slope 0.25" in section
    there["gates/tanh-gate.config.json"] = {
        **config, "training": {"max_steps": 120, "gate_learning_rate_factor": 2.5},
    }  # fmt: skip
    assert "rate of the gates 2.5 times the model's" in tables.gates_section()
