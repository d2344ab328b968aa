"""`byheart tokenizer`: the place is looked at before anything is learned."""

import pytest

from byheart.data.tokenize import BpeTokenizer, ByteTokenizer, load_tokenizer


def test_a_tokenizer_is_replaced_only_on_request(command, documents, tmp_path, monkeypatch):
    arguments = ["tokenizer", "train", documents, "--out", tmp_path]
    assert command(*arguments, "--vocab-size", 300)[0] == 0
    before = (tmp_path / "tokenizer.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(BpeTokenizer, "train", pytest.fail)
        code, _, err = command(*arguments, "--vocab-size", 260)
    assert code == 2
    assert f"{tmp_path} must not hold a tokenizer already, found tokenizer.json. Replace" in err
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    code, _, err = command(*arguments, "--vocab-size", 260, "--overwrite")
    assert code == 0, err
    assert load_tokenizer(tmp_path).vocab_size == 260


def test_what_replaces_a_byte_tokenizer_is_what_is_loaded(command, documents, tmp_path):
    ByteTokenizer().save(tmp_path)
    arguments = ["tokenizer", "train", documents, "--out", tmp_path, "--vocab-size", 260]
    code, _, err = command(*arguments)
    assert code == 2
    assert "found byte_tokenizer.json" in err
    code, _, err = command(*arguments, "--overwrite")
    assert code == 0, err
    assert load_tokenizer(tmp_path).vocab_size == 260


def test_a_place_that_cannot_be_written_to_is_refused_first(
    command, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(BpeTokenizer, "train", pytest.fail)
    file = tmp_path / "file"
    file.write_text("not a folder")
    for place in (file, file / "bpe"):
        code, _, err = command("tokenizer", "train", documents, "--out", place)
        assert code == 2
        assert f"one that can be written to, got {place}" in err
    assert file.read_text() == "not a folder"
    code, _, err = command("tokenizer", "train", tmp_path / "nowhere", "--out", tmp_path / "bpe")
    assert code == 1
    assert "existing file or folder" in err
    assert not (tmp_path / "bpe").exists()
