"""What the tests of the command share: the command itself, documents and a finished run."""

import json
import subprocess
import sys

import pytest

from byheart.cli.main import main

SMALL = [
    "--set=model.num_layers=2",
    "--set=model.embed_dim=32",
    "--set=model.num_heads=2",
    "--set=model.head_dim=16",
    "--set=model.hidden_dim=64",
    "--set=model.segment_length=32",
    "--set=model.xl_cache_length=32",
    "--set=model.knn_memory.layers=[1]",
    "--set=model.knn_memory.memory_size=128",
    "--set=model.knn_memory.top_k=4",
    "--set=training.max_steps=12",
    "--set=training.warmup_steps=2",
    "--set=training.rows_per_device=2",
    "--set=training.save_every=6",
    "--set=training.log_every=4",
    "--set=training.precision=float32",
    "--set=data.tokenizer=bytes",
]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in this process; give exit code, standard output and standard error."""
    monkeypatch.setenv("BYHEART_CACHE", str(tmp_path / "cache"))

    def run(*arguments, columns=200):
        monkeypatch.setattr(sys, "argv", ["byheart", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture(scope="session")
def small():
    """Options of `byheart train text` for a model of seconds."""
    return SMALL


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, words in (("one", "the cat sat on the mat "), ("two", "a dog ran to the gate ")):
        (folder / f"{name}.txt").write_text(words * 60, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_dir(documents, tmp_path_factory):
    """One run for all tests, made in a process of its own as a user would."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    result = subprocess.run(
        [
            sys.executable, "-m", "byheart.cli.main", "train", "text", "--data", documents,
            "--validation", documents, "--out", directory, "--json", *SMALL,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 12
    return directory
