"""The command from the outside: a folder of text goes in, results come out."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from byheart.cli import common
from byheart.cli import train as train_command
from byheart.cli.common import parse_sizes
from byheart.data.tokenize import ByteTokenizer
from byheart.models.checkpoint import load_model
from byheart.models.fingerprint import model_fingerprint
from byheart.training.stop import TrainingInterruptedError


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


def test_result_says_what_was_measured(command, run_dir, tmp_path):
    code, _, err = command("evaluate", run_dir, "--no-plot", "--out", tmp_path)
    assert code == 0, err
    settings = json.loads((tmp_path / "result.json").read_text())["settings"]
    decoder = load_model(run_dir / "model")
    assert settings["model"] == str(run_dir)
    assert settings["model_fingerprint"] == model_fingerprint(decoder)
    assert settings["tokenizer_fingerprint"] == ByteTokenizer().fingerprint
    assert (settings["rows"], settings["xl_cache"]) == (8, "with")
    assert settings["max_documents"] is settings["max_tokens_per_document"] is None
    assert settings["versions"] == {"byheart": "0.1.0", "torch": version("torch")}


def test_caps_of_the_run_are_for_its_own_documents(command, run_dir, documents, tmp_path):
    copy = tmp_path / "capped"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["evaluation"] |= {"max_documents": 1, "max_tokens": 33}
    (copy / "config.json").write_text(json.dumps(config))

    def measure(*arguments):
        code, out, err = command("evaluate", copy, *arguments, "--json", "--no-plot")
        assert code == 0, err
        (measurement,) = json.loads(out)["measurements"]
        return measurement["num_documents"], measurement["num_tokens"], err

    num_documents, num_tokens, err = measure()
    assert (num_documents, num_tokens) == (1, 32)
    assert "the first 1 documents (--max-documents)" in err
    assert "the first 33 tokens of each document (--max-tokens)" in err
    num_documents, num_tokens, err = measure("--max-tokens", 20)
    assert (num_documents, num_tokens) == (1, 19)
    assert "--max-tokens" not in err
    num_documents, num_tokens, err = measure(documents)
    assert num_documents == 2
    assert num_tokens > 2000
    assert "As in the run" not in err


def test_documents_are_read_as_every_command_is_told(command, run_dir, documents, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"body": "one text"}\nbad\n')
    (folder / "b.txt").write_text("another text")
    reading = ["--skip-bad", "--text-key", "body", "--suffix", ".jsonl", "--folder-as", "file"]
    for arguments in (
        ["data", "stats", folder],
        ["evaluate", run_dir, folder, "--no-plot", "--out", tmp_path / "out"],
        ["tokenizer", "train", folder, "--out", tmp_path / "bpe", "--vocab-size", 260],
        ["generate", run_dir, "--prompt", "x", "--max-new-tokens", 1, "--read", folder],
    ):
        code, out, err = command(*arguments, *reading, "--json")
        assert code == 0, err
        result = json.loads(out)
        if "num_documents" in result:
            assert result["num_documents"] == 1
        if "num_tokens_before" in result:
            assert result["num_tokens_before"] == 1 + len("one text")
    code, out, _ = command("train", "text", "--data", folder, *reading, "--show")
    data = json.loads(out)["data"]
    assert (data["on_bad"], data["text_key"], data["suffixes"]) == ("skip", "body", [".jsonl"])
    code, _, err = command("data", "stats", folder)
    assert code == 1
    assert "on_bad='skip' (--skip-bad)" in err
    code, _, err = command("evaluate", run_dir, "--skip-bad")
    assert code == 2
    assert "need DOCUMENTS" in err


def test_a_memory_that_does_not_fit_on_the_disk_is_one_clear_line(run_dir, documents, tmp_path):
    limited = (
        "import resource; _, hard = resource.getrlimit(resource.RLIMIT_FSIZE); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard)); "
        "from byheart.cli.main import main; main()"
    )
    result = subprocess.run(
        [
            sys.executable, "-c", limited, "generate", run_dir, "--prompt", "x",
            "--read", documents / "one.txt", "--save-memory", tmp_path / "notes",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert "notes could not be written" in result.stderr
    assert not (tmp_path / "notes").exists()


def test_generate_goes_on_from_a_saved_memory(command, run_dir, documents, tmp_path):
    code, out, err = command(
        "generate", run_dir, "--read", documents / "one.txt", "--prompt", "the cat",
        "--save-memory", tmp_path / "notes", "--max-new-tokens", 9, "--temperature", 0,
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("the cat")
    num_read = 1 + (documents / "one.txt").stat().st_size
    assert f"{num_read:,} tokens had been read; the kNN memory held 128 of 128 entries" in err
    code, again, err = command(
        "generate", run_dir, "--memory", tmp_path / "notes", "--prompt", "the cat",
        "--max-new-tokens", 9, "--temperature", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(again)
    assert "the cat" + result["text"] == out.removesuffix("\n")
    # the start token and the document
    assert result["num_tokens_before"] == num_read
    assert result["num_entries_before"] == result["memory_size"] == 128
    code, _, err = command("generate", run_dir, "--prompt", "x", "--memory-size", "1K")
    assert code == 0
    assert "the kNN memory held 0 of 1,024 entries" in err
    code, _, err = command("generate", run_dir, "--prompt", "x", "--memory-size", "0")
    assert code == 0
    assert "0 tokens had been read; the kNN memory was off" in err


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
        (["evaluate", "x", "--max-documents", "0"], "Invalid value for '--max-documents'"),
        (["evaluate", "x", "--max-tokens", "1"], "Invalid value for '--max-tokens'"),
        (["evaluate", "x", "--device", "abacus"], "--device must be a device of this machine"),
        (["generate", "x", "--device", "cuda:99"], "--device must be a device of this machine"),
        (["data", "stats", "x", "--folder-as", "book"], "must be file or folder"),
        (["data", "stats", "x", "--segment-length", "0"], "Invalid value for '--segment-length'"),
        (["generate", "x", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["generate", "x", "--temperature", "1e-320"], "must be 0 for the most likely token, or"),
        (["generate", "x", "--temperature", "nan"], "must be 0 for the most likely token, or"),
        (["generate", "x", "--memory-size", "8K,9K"], "--memory-size must be one size such as"),
        (["generate", "x", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["generate", "x", "--top-p", "0"], "Invalid value for '--top-p': must be above 0"),
        (["generate", "x", "--top-p", "1.5"], "Invalid value for '--top-p'"),
        (["generate", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["generate", "x", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["train", "demo", "--resume", "--overwrite"], "--resume goes on with the run that"),
        (
            ["tokenizer", "train", "x", "--out", "y", "--vocab-size", "9"],
            "Invalid value for '--vocab-size'",
        ),
    ],
)
def test_wrong_usage_exits_with_2(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err


def test_what_is_stopped_exits_with_130_and_a_line(command, run_dir, monkeypatch):
    for error, line in (
        (KeyboardInterrupt(), "Stopped by Ctrl-C."),
        (KeyboardInterrupt("SIGTERM"), "Stopped by SIGTERM."),
        (TrainingInterruptedError("Training was stopped."), "error: Training was stopped."),
    ):

        def stop(*arguments, error=error):
            raise error

        monkeypatch.setattr("byheart.cli.generate.open_run", stop)
        code, out, err = command("generate", run_dir, "--prompt", "x")
        assert (code, out, err) == (130, "", line)


def test_failures_exit_with_1_and_one_clear_line(command, run_dir, documents, tmp_path, small):
    empty = tmp_path / "empty"
    empty.mkdir()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "x"}\n')
    for arguments, message in (
        (["train", "text", "--data", empty, *small], "empty"),
        (["train", "text", "--data", latin, *small], "latin.txt"),
        (["train", "text", "--data", short, *small], "short.jsonl"),
        (
            ["train", "text", "--data", tmp_path / "nowhere", *small],
            "existing file or folder",
        ),
        (
            ["train", "text", "--data", documents, "--out", latin, *small],
            f"out_dir (--out) must be a directory, and {latin} is a file",
        ),
        (
            ["train", "rmt-memorize", "--out", latin / "run"],
            f"out_dir (--out) must be a directory, and {latin} is a file",
        ),
        (["evaluate", tmp_path], "must hold a finished run"),
        (["train", "text", "--data", documents, "--out", run_dir, *small], "resume"),
        (["generate", run_dir, "--prompt", "x", "--memory", tmp_path / "nowhere"], "no directory"),
    ):
        code, out, err = command(*arguments)
        assert code == 1, arguments
        assert "Traceback" not in err
        assert message in err, err
        assert not out


def test_memory_size_of_a_loaded_memory_is_refused(command, run_dir, tmp_path):
    code, out, err = command(
        "generate", run_dir, "--prompt", "x", "--memory", tmp_path, "--memory-size", 8
    )
    assert code == 2
    assert "--memory-size has no effect" in err
    assert not out


def test_a_model_refuses_another_tokenizer(command, run_dir, documents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "tokenizer")
    command("tokenizer", "train", documents, "--out", copy / "tokenizer", "--vocab-size", 300)
    code, _, err = command("generate", copy, "--prompt", "x")
    assert code == 1
    assert "was trained with the tokenizer" in err


def test_a_diverged_run_is_valid_json(command, documents, tmp_path, small):
    code, out, err = command(
        "train", "text", "--data", documents, "--out", tmp_path / "nan", "--json", *small,
        "--set=training.learning_rate=1e30", "--set=training.max_steps=4",
        "--set=model.knn_memory=null",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out, parse_constant=pytest.fail)
    assert result["loss"] is None


def test_learning_a_tokenizer_says_so(command, documents, tmp_path, small):
    code, _, err = command(
        "train", "text", "--data", documents, "--out", tmp_path / "bpe", *small,
        "--set=data.tokenizer=bpe:270", "--set=training.max_steps=1",
    )  # fmt: skip
    assert code == 0, err
    assert f"Learning a BPE of 270 tokens from {documents}" in err


def test_paths_are_looked_at_before_a_tokenizer_is_learned(command, documents, tmp_path):
    code, _, err = command(
        "train", "text", "--data", documents, "--validation", tmp_path / "nope", "--out",
        tmp_path / "run", "--set=data.tokenizer=bpe:270",
    )  # fmt: skip
    assert code == 1
    assert "nope must be an existing file or folder" in err
    assert "Learning a BPE" not in err


def test_tokenizing_shows_a_bar_that_ends_before_training(documents, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "err_console", console := Console(force_terminal=True))
    monkeypatch.setattr(common, "err_console", console)
    run = train_command.find_recipe("demo")
    with train_command._preparation(run) as on_event:
        progress = {"stage": "tokenize", "num_bytes": 3, "total_bytes": 7, "num_documents": 1}
        on_event(SimpleNamespace(kind="tokenize", values=progress))
        on_event(SimpleNamespace(kind="start", values={}))
        before = capsys.readouterr().out
        assert "tokenize" in before
        assert "43%" in before
        on_event(SimpleNamespace(kind="log", values={}))
        assert capsys.readouterr().out == ""


def test_help_and_version_do_not_wait_for_transformers():
    script = (
        "import sys\n"
        "from byheart.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'transformers' not in sys.modules"
    )
    for option, expected in (("--version", "byheart 0.1.0"), ("--help", "evaluate")):
        result = subprocess.run(
            [sys.executable, "-c", script, option], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


def test_sizes_are_read_with_units():
    assert parse_sizes("0,2048, 8K,1m") == (0, 2048, 8192, 1 << 20)


def test_the_module_can_be_run_as_a_script():
    result = subprocess.run(
        [sys.executable, str(Path(sys.executable).parent / "byheart"), "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.startswith("byheart ")


@pytest.fixture
def unwritable(tmp_path):
    """A place where no directory can be made, for root neither."""
    file = tmp_path / "file"
    file.write_text("not a folder")
    return file / "results"


def test_what_cannot_be_written_is_refused_before_it_is_measured(
    command, run_dir, unwritable, monkeypatch
):
    monkeypatch.setattr("byheart.cli.evaluate.evaluate_perplexity", pytest.fail)
    monkeypatch.setattr("byheart.cli.evaluate.run_suite", pytest.fail)
    for arguments in (
        ["evaluate", run_dir],
        ["evaluate", run_dir, "--suite", "passkey"],
        ["reproduce", "memorize", "--quick"],
        ["reproduce", "generalization", "--quick"],
        ["reproduce", "flops"],
    ):
        code, out, err = command(*arguments, "--out", unwritable)
        assert code == 2, err
        assert f"one that can be written to, got {unwritable}" in err
        assert "Nothing was computed. Name another with --out." in err
        assert not out


def test_measuring_a_run_that_is_not_there_makes_no_directory(command, tmp_path):
    for name in ("evaluate", "evaluate-task"):
        code, _, err = command(name, tmp_path / "nowhere")
        assert code == 1, err
        assert not (tmp_path / "nowhere").exists()


def test_a_result_is_whole_whatever_standard_output_can_show(run_dir):
    # both forms from one process, as starting it takes longest
    script = (
        "import sys\n"
        "from byheart.cli.main import main\n"
        "from byheart.data.tokenize import ByteTokenizer\n"
        "ByteTokenizer.decode = lambda self, ids: 'caf\\xe9 \\u2192'\n"
        "arguments = sys.argv\n"
        "for option in ([], ['--json']):\n"
        "    sys.argv = arguments + option\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        "    print('----', flush=True)\n"
    )
    arguments = ["generate", run_dir, "--prompt", "x", "--max-new-tokens", "1"]
    shown = {}
    for encoding in ("ascii", "utf-8"):
        result = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, check=False,
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        shown[encoding] = result.stdout.decode(encoding).split("----\n")[:2]
    assert shown["ascii"][0] == "xcaf? ?\n"
    assert shown["utf-8"][0] == "xcaf\xe9 \u2192\n"
    for _, as_json in shown.values():
        assert json.loads(as_json)["text"] == "caf\xe9 \u2192"
    assert "caf\xe9" in shown["utf-8"][1]


def test_documents_of_a_run_that_are_not_there_are_named_with_their_source(
    command, run_dir, documents, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["validation"] = "my/books"
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = command("evaluate", copy)
    assert code == 1
    assert f"must be where {copy / 'config.json'} says, my/books, and are not there" in err
    assert f"Name them: byheart evaluate {copy} DOCUMENTS" in err
