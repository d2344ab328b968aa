"""The command from the outside: a folder of text goes in, results come out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from byheart.cli.common import parse_sizes
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


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name, words in (("one", "the cat sat on the mat "), ("two", "a dog ran to the gate ")):
        (folder / f"{name}.txt").write_text(words * 60, encoding="utf-8")
    return folder


def byheart(monkeypatch, capsys, *arguments):
    """Run the command in this process; give exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["byheart", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, " ".join(err.replace("│", " ").split())


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("BYHEART_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: byheart(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
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


def test_a_run_leaves_config_log_and_model(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    assert config["model"]["knn_memory"]["memory_size"] == 128
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert (run_dir / "model").is_dir()
    assert (run_dir / "tokenizer").is_dir()


def test_a_saved_config_repeats_the_run(command, run_dir, tmp_path):
    code, _, err = command("train", run_dir / "config.json", "--out", tmp_path / "again")
    assert code == 0, err
    losses = [
        [json.loads(line).get("loss") for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run_dir, tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_evaluate_writes_table_json_and_plots(command, run_dir):
    code, out, err = command("evaluate", run_dir, "--memory-size", "0,128,512")
    assert code == 0, err
    assert "Perplexity by memory size" in out
    result = json.loads((run_dir / "evaluation" / "result.json").read_text())
    assert [item["memory_size"] for item in result["measurements"]] == [0, 128, 512]
    assert (run_dir / "evaluation" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_json_is_the_only_thing_on_standard_output(command, run_dir, documents):
    code, out, _ = command(
        "evaluate", run_dir, documents / "one.txt", "--json", "--no-plot", "--xl-cache", "both"
    )
    assert code == 0
    assert len(json.loads(out)["measurements"]) == 2


def test_generate_goes_on_from_a_saved_memory(command, run_dir, documents, tmp_path):
    code, out, err = command(
        "generate", run_dir, "--read", documents / "one.txt", "--prompt", "the cat",
        "--save-memory", tmp_path / "notes", "--max-new-tokens", 9, "--temperature", 0,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("the cat")
    code, again, err = command(
        "generate", run_dir, "--memory", tmp_path / "notes", "--prompt", "the cat",
        "--max-new-tokens", 9, "--temperature", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(again)
    assert "the cat" + result["text"] == out.removesuffix("\n")
    # the start token and the document
    assert result["num_tokens_before"] == 1 + (documents / "one.txt").stat().st_size


def test_tokenizer_and_stats(command, documents, tmp_path):
    code, out, err = command(
        "tokenizer", "train", documents, "--out", tmp_path / "bpe", "--vocab-size", 300, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["vocab_size"] <= 300
    code, out, err = command("data", "stats", documents, "--tokenizer", tmp_path / "bpe", "--json")
    assert code == 0, err
    assert json.loads(out)["num_documents"] == 2
    code, out, _ = command("data", "stats", documents)
    assert code == 0
    assert "bytes per token" in out


def test_recipes_are_listed_and_shown(command, documents):
    code, out, _ = command("train", "--list")
    assert code == 0
    assert "compare-memory" in out
    code, out, _ = command("train", "text", "--data", documents, "--show")
    assert json.loads(out)["data"]["train"] == str(documents)


def test_a_recipe_can_be_a_function_in_a_file(command, tmp_path, documents):
    recipe = tmp_path / "mine.py"
    recipe.write_text("from byheart.recipes.demo import demo\n\ndef small():\n    return demo()\n")
    code, out, err = command("train", f"{recipe}:small", "--show")
    assert code == 0, err
    assert json.loads(out)["name"] == "demo"
    code, _, err = command("train", f"{recipe}:nothing", "--show")
    assert code == 2
    assert "must have a function nothing()" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Name a recipe"),
        (["train", "nothing"], "There is no recipe or file 'nothing'"),
        (["train", "text"], "needs documents: pass --data"),
        (
            ["train", "demo", "--set", "model.knn_memory.topk=3"],
            "Did you mean model.knn_memory.top_k",
        ),
        (["train", "demo", "--set", "model.knn_memory.top_k=9999"], "between 1 and memory_size"),
        (["train", "demo", "--set", "model.knn_memory.layers=[4]"], "between 0 and 3"),
        (["evaluate", "x", "--memory-size", "1,many"], "got 'many'"),
        (["evaluate", "x", "--xl-cache", "maybe"], "must be with, without or both"),
        (["data", "stats", "x", "--folder-as", "book"], "must be file or folder"),
    ],
)
def test_wrong_usage_exits_with_2(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err


def test_failures_exit_with_1_and_one_clear_line(command, run_dir, documents, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "x"}\n')
    for arguments, message in (
        (["train", "text", "--data", empty, *SMALL], "empty"),
        (["train", "text", "--data", latin, *SMALL], "latin.txt"),
        (["train", "text", "--data", short, *SMALL], "short.jsonl"),
        (["train", "text", "--data", tmp_path / "nowhere", *SMALL], "existing file or folder"),
        (["evaluate", tmp_path], "must hold a finished run"),
        (["train", "text", "--data", documents, "--out", run_dir, *SMALL], "resume"),
        (["generate", run_dir, "--prompt", "x", "--memory", tmp_path / "nowhere"], "no directory"),
    ):
        code, out, err = command(*arguments)
        assert code == 1, arguments
        assert "Traceback" not in err
        assert message in err, err
        assert not out


def test_a_model_refuses_another_tokenizer(command, run_dir, documents, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "tokenizer")
    command("tokenizer", "train", documents, "--out", copy / "tokenizer", "--vocab-size", 300)
    code, _, err = command("generate", copy, "--prompt", "x")
    assert code == 1
    assert "was trained with the tokenizer" in err


def test_sizes_are_read_with_units():
    assert parse_sizes("0,2048, 8K,1m") == (0, 2048, 8192, 1 << 20)


def test_the_module_can_be_run_as_a_script():
    result = subprocess.run(
        [sys.executable, str(Path(sys.executable).parent / "byheart"), "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.startswith("byheart ")
