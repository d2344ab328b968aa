"""`byheart generate`: what is wanted is looked at before anything is read."""

import json
import math
import shutil

import pytest

from byheart.models.checkpoint import load_model, save_model


@pytest.fixture
def nothing_is_read(monkeypatch):
    monkeypatch.setattr("byheart.cli.generate._read", pytest.fail)


def test_a_memory_can_be_kept_without_a_prompt(command, run_dir, documents, tmp_path):
    text, notes = documents / "one.txt", tmp_path / "notes"
    arguments = ["generate", run_dir, "--read", text, "--save-memory", notes]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert not out
    num_read = 1 + text.stat().st_size
    assert f"Kept in {notes}: {num_read:,} tokens had been read; the kNN memory held 128" in err
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "text": "", "num_tokens": 0, "num_tokens_before": num_read, "num_entries_before": 128,
        "memory_size": 128,
    }  # fmt: skip
    going_on = ["--prompt", "the cat", "--max-new-tokens", 5, "--temperature", 0]
    code, out, err = command("generate", run_dir, "--memory", notes, *going_on)
    assert code == 0, err
    assert (code, out) == command("generate", run_dir, "--read", text, *going_on)[:2]


def test_without_a_prompt_there_must_be_something_to_keep(
    command, run_dir, documents, tmp_path, nothing_is_read
):
    code, out, err = command("generate", run_dir, "--read", documents)
    assert code == 2
    assert "Give --prompt a text to continue, or --read and --save-memory" in err
    assert not out


def test_where_a_memory_cannot_be_kept_nothing_is_read(
    command, run_dir, documents, tmp_path, nothing_is_read
):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for place, expected, message in (
        (file / "a" / "notes", 2, f"a place that can be written to, got {file / 'a' / 'notes'}"),
        (file, 1, f"{file} must be a directory, found a file"),
        (documents, 1, "would be replaced as a whole"),
    ):
        arguments = ["--read", documents, "--prompt", "x", "--save-memory", place]
        code, out, err = command("generate", run_dir, *arguments)
        assert code == expected, err
        assert message in err
        assert not out
    assert file.read_text() == "not a folder"


def test_an_older_memory_stays_where_reading_fails(command, run_dir, documents, tmp_path):
    notes = tmp_path / "notes"
    arguments = ["generate", run_dir, "--save-memory", notes, "--read"]
    assert command(*arguments, documents)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = command(*arguments, tmp_path / "nowhere")
    assert code == 1
    assert "existing file or folder" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_hugging_face_folder_is_told_apart_from_an_unfinished_run(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}')
    for name in ("generate", "evaluate"):
        code, _, err = command(name, tmp_path)
        assert code == 1
        assert "It holds a Hugging Face model, which has no memory yet." in err
        assert f"byheart train attach --model {tmp_path} --data DOCUMENTS" in err
        assert "--resume" not in err
    code, _, err = command("evaluate-task", tmp_path)
    assert code == 1
    assert "and holds a Hugging Face model. Pass the --out directory of byheart train" in err
    assert "byheart evaluate" not in err


@pytest.mark.parametrize("temperature", [0, 1])
def test_weights_that_are_no_numbers_end_in_one_clear_line(temperature, command, run_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run_dir, broken)
    decoder = load_model(broken / "model")
    # behind all layers: what they are asked for must be finite anyway
    (last,) = decoder.norm.parameters()
    last.data.fill_(math.nan)
    save_model(decoder, broken / "model")
    arguments = ["--prompt", "the cat", "--max-new-tokens", 3, "--temperature", temperature]
    code, out, err = command("generate", broken, *arguments)
    assert code == 1
    assert not out
    assert "scores of the next token must be numbers" in err
    assert "Traceback" not in err
