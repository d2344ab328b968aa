import pytest

from byheart.data import sample
from byheart.data.documents import iter_documents
from byheart.data.sample import build, sample_path
from byheart.errors import DataError


def test_the_sample_is_small_and_has_long_documents():
    folder = sample_path("train").parent
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 3_000_000
    texts = [
        d.text for split in ("train", "validation") for d in iter_documents(sample_path(split))
    ]
    assert sum(map(len, texts)) > 8_000_000
    assert min(map(len, texts)) > 29_000
    assert all(text.startswith("# ==== ") for text in texts)


def test_the_splits_share_no_document():
    train, validation = (
        {document.id for document in iter_documents(sample_path(split))}
        for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (63, 8)
    assert not train & validation


def test_the_licence_travels_with_the_sample():
    text = (sample_path("train").parent / "LICENSE.txt").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text


def test_the_sample_can_be_built_again_from_an_interpreter(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    big = "x = 'é'\n" * 5000
    for name, text in {
        "LICENSE.txt": "licence",
        "email/a.py": big,
        "email/deep/b.py": "b = 1\n",
        "email/test/c.py": "left out",
        "abc.py": big,
        "tiny.py": "t = 1\n",
        "config-3.11/d.py": big,
        "_sysconfigdata__linux.py": big,
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    build.build(tmp_path / "out")
    train = list(iter_documents(tmp_path / "out" / "train.jsonl.xz"))
    assert [(d.id, d.text) for d in train] == [("abc", f"# ==== abc.py\n{big}")]
    (email,) = iter_documents(tmp_path / "out" / "validation.jsonl.xz")
    assert email.text == f"# ==== email/a.py\n{big}# ==== email/deep/b.py\nb = 1\n"
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "licence"


def test_a_sample_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"must lie at .*train\.jsonl\.xz, and does not"):
        sample_path("train")
