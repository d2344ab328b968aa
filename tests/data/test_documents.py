import gzip
import json
import logging
import lzma
import sys

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from byheart.data.documents import Document, ReadReport, iter_documents
from byheart.errors import DataError

RECORDS = [{"id": "a", "text": "first\r\ntext"}, {"text": "zweiter Text ü"}, {"id": 7, "text": ""}]


def json_lines(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(path, content: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, **options):
    return {document.id: document.text for document in iter_documents(path, **options)}


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:]),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read_whatever_the_compression(tmp_path, suffix):
    path = write(tmp_path / f"corpus.jsonl{suffix}", COMPRESS[suffix](json_lines(RECORDS)))
    reader = iter_documents(path)
    assert list(reader) == [
        Document(id="a", text="first\r\ntext", source=f"{path}:1"),
        Document(id=f"corpus.jsonl{suffix}:2", text="zweiter Text ü", source=f"{path}:2"),
        Document(id="7", text="", source=f"{path}:3"),
    ]
    assert reader.report == ReadReport(num_documents=3)
    assert reader.num_bytes_read == path.stat().st_size


@given(st.lists(st.text(), min_size=1))
def test_json_lines_give_back_every_text(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_bytes(json_lines({"id": str(i), "text": text} for i, text in enumerate(written)))
    assert list(texts(path).values()) == written


@pytest.mark.parametrize("suffix", COMPRESS)
def test_any_other_file_is_one_text(tmp_path, suffix):
    text = "one\r\ntwo\n\nthree"
    path = write(tmp_path / f"book.txt{suffix}", COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    assert list(iter_documents(path)) == [Document(id=path.name, text=text, source=str(path))]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "shelf"
    write(root / "b" / "z.py", "z")
    write(root / "b" / "deep" / "a.py", "a\n")
    write(root / "b.md", "top")
    write(root / "a" / "data.bin", b"x" * 10_000 + b"\0")
    write(root / "a" / "x.py", "x")
    write(root / "a" / "notes.jsonl", json_lines([{"id": "note", "text": "n"}]))
    write(root / "a" / ".hidden", "h")
    write(root / ".git" / "config", "g")
    return root


def test_a_folder_gives_its_text_files_in_sorted_order(folder):
    reader = iter_documents(folder)
    assert [(document.id, document.text) for document in reader] == [
        ("note", "n"),
        ("a/x.py", "x"),
        ("b/deep/a.py", "a\n"),
        ("b/z.py", "z"),
        ("b.md", "top"),
    ]
    assert reader.report == ReadReport(num_documents=5, num_binary_files=1, num_hidden_files=2)


def test_a_folder_of_folders_gives_one_document_each(folder):
    found = texts(folder, folder_as="folder", suffixes={"py", ".md"})
    assert found == {"a": "x", "b": "a\nz", "shelf": "top"}


def test_files_without_content_are_passed_over_in_a_folder(folder, tmp_path):
    write(folder / "b" / "__init__.py", "")
    write(folder / "b" / "blank.py", b"\xef\xbb\xbf \n")
    reader = iter_documents(folder)
    assert len(list(reader)) == 5
    assert reader.report.num_empty_files == 2
    joined = iter_documents(folder, folder_as="folder", suffixes=["py"])
    assert [document.text for document in joined] == ["x", "a\nz"]
    assert joined.report.num_empty_files == 2
    write(tmp_path / "void" / "__init__.py", "")
    with pytest.raises(DataError, match=r"at least one document, .* 0 binary, 1 empty\)"):
        list(iter_documents(tmp_path / "void"))
    # a file that is named is not passed over
    assert texts(folder / "b" / "__init__.py") == {"__init__.py": ""}


def test_joined_files_keep_their_lines_apart(tmp_path):
    write(tmp_path / "d" / "1", "one")
    write(tmp_path / "d" / "2", "two\n")
    write(tmp_path / "d" / "3", "three")
    assert texts(tmp_path, folder_as="folder") == {"d": "one\ntwo\nthree"}


def test_suffixes_count_behind_compression_and_files_left_out_are_counted(folder):
    write(folder / "c.PY.gz", gzip.compress(b"c"))
    reader = iter_documents(folder, suffixes=(".py",))
    assert [document.text for document in reader] == ["x", "a\n", "z", "c"]
    assert reader.report.num_other_files == 3


def test_links_to_folders_are_not_followed(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "broken.py").symlink_to(folder / "nowhere")
    reader = iter_documents(folder)
    assert len(list(reader)) == 5
    assert reader.report.num_other_files == 1


BAD = {
    "no JSON": (b'{"text": "unfinished', "must be a JSON record: Invalid control"),
    "no object": (b'["text"]', "must be a JSON object, got list"),
    "no text": (b'{"body": "b", "id": 3}', "must have a string under text_key='text', has keys: b"),
    "no string": (b'{"text": 5}', "must have a string under text_key='text', has int"),
    "no UTF-8": (b'{"text": "\xff"}', "must be UTF-8: 'utf-8' codec can't decode byte 0xff"),
    "half a character": (b'{"text": "\\ud800"}', "must be Unicode text: .*surrogates not"),
    "too deep": (b"[" * 100_000, "must be a JSON record"),
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_bad_record_is_named_and_refused_or_skipped(tmp_path, caplog, line):
    content, message = line
    good = json_lines([{"text": "good"}])
    path = write(tmp_path / "corpus.jsonl", good + b"\n" + content + b"\n" + good)
    with pytest.raises(DataError, match=f"corpus.jsonl:3 {message}.*on_bad='skip' .--skip-bad"):
        list(iter_documents(path))
    reader = iter_documents(path, on_bad="skip")
    assert [document.source for document in reader] == [f"{path}:1", f"{path}:4"]
    assert reader.report == ReadReport(num_documents=2, num_bad=1)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "corpus.jsonl:3" in caplog.text


def test_a_text_file_that_is_not_utf8_is_named(folder):
    write(folder / "b" / "latin.txt", "für".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt must be UTF-8.*0xfc in position 1"):
        list(iter_documents(folder))
    for folder_as in ("file", "folder"):
        reader = iter_documents(folder, on_bad="skip", folder_as=folder_as)
        assert not any("f" in document.text for document in reader)
        assert reader.report.num_bad == 1


def test_many_bad_records_give_few_warnings(tmp_path, caplog):
    path = write(tmp_path / "corpus.jsonl", b"bad\n" * 1000 + json_lines(RECORDS))
    reader = iter_documents(path, on_bad="skip")
    assert len(list(reader)) == 3
    assert reader.report.num_bad == 1000
    assert len(caplog.records) == 11
    assert "Skipped 990 more documents" in caplog.text


def test_the_text_key_can_be_chosen(tmp_path):
    path = write(tmp_path / "corpus.jsonl", json_lines([{"id": "x", "content": "c", "text": "t"}]))
    assert texts(path, text_key="content") == {"x": "c"}


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_file_is_refused_even_if_bad_records_are_skipped(tmp_path, suffix):
    whole = COMPRESS[suffix](json_lines({"text": f"{i} {i**9}"} for i in range(5000)))
    cut = write(tmp_path / f"cut.jsonl{suffix}", whole[:-15])
    with pytest.raises(DataError, match=rf"cut\.jsonl{suffix} must be a whole {suffix} file"):
        list(iter_documents(cut, on_bad="skip"))
    middle = len(whole) // 2
    changed = whole[:middle] + bytes(255 - byte for byte in whole[middle:])
    hurt = write(tmp_path / f"hurt.jsonl{suffix}", changed)
    with pytest.raises(DataError, match=rf"hurt\.jsonl{suffix} must be a whole {suffix} file"):
        list(iter_documents(hurt, on_bad="skip"))


def test_a_corpus_without_documents_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be an existing file or folder"):
        iter_documents(tmp_path / "missing")
    with pytest.raises(DataError, match="must hold at least one file, got none"):
        iter_documents(tmp_path)
    write(tmp_path / ".hidden", "h")
    write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match=r"file ending in \.py, got none \(1 hidden, 1 of another"):
        iter_documents(tmp_path, suffixes=[".py"])
    write(tmp_path / "empty.jsonl", "\n\n")
    with pytest.raises(DataError, match=r"must hold at least one document, got none \(0 bad"):
        list(iter_documents(tmp_path / "empty.jsonl"))
    write(tmp_path / "bad.jsonl", "bad")
    with pytest.raises(
        DataError, match=r"at least one document, got none \(1 bad, 0 binary, 0 empty\)"
    ):
        list(iter_documents(tmp_path / "bad.jsonl", on_bad="skip"))


def test_what_could_be_meant_two_ways_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"got a \.json file\. Rename it to \.jsonl if"):
        iter_documents(write(tmp_path / "corpus.json.gz", b""))
    with pytest.raises(TypeError, match=r"suffixes must be a collection.*Write \('\.py',\)"):
        iter_documents(tmp_path, suffixes=".py")


def test_a_missing_zstandard_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "corpus.jsonl.zst", COMPRESS[".zst"](json_lines(RECORDS)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install 'byheart\[data\]'"):
        list(iter_documents(path))
