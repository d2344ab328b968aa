import json
import logging
import os
import pickle
import threading
import time

import numpy as np
import pytest

from byheart.data import files, token_cache
from byheart.data.corpus import TokenizedCorpus
from byheart.data.documents import ReadReport
from byheart.data.rows import Corpus
from byheart.data.token_cache import TokenizeProgress, default_cache_dir, tokenize_corpus
from byheart.data.tokenize import BpeTokenizer, ByteTokenizer
from byheart.errors import DataError

TEXTS = ["Call me Ishmael.", "Für immer und ewig, " * 50, "ab"]


def write_corpus(path, texts=TEXTS):
    lines = [json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path


@pytest.fixture
def source(tmp_path):
    return write_corpus(tmp_path / "source" / "corpus.jsonl")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


class CountingTokenizer(ByteTokenizer):
    def __init__(self):
        self.num_texts = 0

    def encode_batch(self, texts):
        self.num_texts += len(texts)
        return super().encode_batch(texts)


class WideTokenizer(ByteTokenizer):
    vocab_size = 70_001
    start_id = None

    def encode_batch(self, texts):
        return [ids + 69_000 for ids in super().encode_batch(texts)]


def corpora_in(cache):
    return [folder for folder in cache.iterdir() if folder.name != "sources"]


def test_a_corpus_holds_the_tokens_of_its_documents(source, cache):
    tokenizer = ByteTokenizer()
    corpus = tokenize_corpus(source, tokenizer, cache)
    assert isinstance(corpus, Corpus)
    assert corpus.num_documents == 3
    assert corpus.document_ids == ("d0", "d1", "d2")
    for index, text in enumerate(TEXTS):
        tokens = corpus.document(index)
        assert tokens.dtype == np.uint16
        assert tokens[0] == 256
        assert tokenizer.decode(tokens) == text
        assert len(tokens) == corpus.lengths[index]
        assert corpus.num_bytes(index) == len(text.encode())
    assert corpus.num_tokens == corpus.lengths.sum() == 3 + sum(len(t.encode()) for t in TEXTS)
    assert corpus.report == ReadReport(num_documents=3)
    assert corpus.manifest.tokenizer_fingerprint == tokenizer.fingerprint


def test_large_vocabularies_and_missing_start_tokens_are_kept(source, cache):
    corpus = tokenize_corpus(source, WideTokenizer(), cache)
    assert corpus.document(2).dtype == np.uint32
    assert corpus.document(2).tolist() == [69_000 + ord("a"), 69_000 + ord("b")]
    assert corpus.manifest.start_id is None


def test_documents_are_views_of_a_file_that_cannot_be_changed(source, cache):
    corpus = tokenize_corpus(source, ByteTokenizer(), cache)
    with pytest.raises(ValueError, match="read-only"):
        corpus.document(0)[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        corpus.lengths[0] = 5
    assert np.shares_memory(corpus.document(1), corpus.document(1))


def test_an_untouched_corpus_is_opened_without_reading_it(source, cache, monkeypatch):
    monkeypatch.setattr(files, "_RACY_SECONDS", 0)
    tokenizer = CountingTokenizer()
    first = tokenize_corpus(source, tokenizer, cache)
    seen = []
    second = tokenize_corpus(source, tokenizer, cache, on_progress=seen.append)
    assert tokenizer.num_texts == 3
    assert seen == []
    assert first.folder == second.folder


def test_a_file_changed_just_now_is_hashed_again(source, cache):
    # same size, and perhaps the same time stamp
    first = tokenize_corpus(source, ByteTokenizer(), cache)
    stat = source.stat()
    write_corpus(source, ["call me Ishmael.", *TEXTS[1:]])
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = tokenize_corpus(source, ByteTokenizer(), cache)
    assert chr(first.document(0)[1]) == "C"
    assert chr(second.document(0)[1]) == "c"


def test_a_moved_corpus_is_recognised_by_its_content(source, cache, tmp_path):
    tokenizer = CountingTokenizer()
    first = tokenize_corpus(source, tokenizer, cache)
    moved = write_corpus(tmp_path / "elsewhere" / "corpus.jsonl")
    assert tokenize_corpus(moved, tokenizer, cache).fingerprint == first.fingerprint
    assert tokenizer.num_texts == 3


def test_whatever_changes_the_tokens_changes_the_corpus(source, cache, tmp_path):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.txt").write_text("some text")
    (folder / "a" / "y.md").write_text("more text")
    renamed = write_corpus(tmp_path / "renamed.jsonl")
    tokenizer = ByteTokenizer()
    corpora = [
        tokenize_corpus(source, tokenizer, cache),
        tokenize_corpus(source, BpeTokenizer.train(TEXTS, 257), cache),
        tokenize_corpus(renamed, tokenizer, cache),
        tokenize_corpus(source, tokenizer, cache, on_bad="skip"),
        tokenize_corpus(source, tokenizer, cache, text_key="id"),
        tokenize_corpus(folder, tokenizer, cache),
        tokenize_corpus(folder, tokenizer, cache, folder_as="folder"),
        tokenize_corpus(folder, tokenizer, cache, suffixes=[".md"]),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    assert [corpus.num_documents for corpus in corpora] == [3, 3, 3, 3, 3, 2, 1, 1]


def test_short_documents_are_named_and_refused_or_skipped(tmp_path, cache, caplog):
    path = write_corpus(tmp_path / "corpus.jsonl", ["text", "", "x", "text"])
    with pytest.raises(DataError, match=r"corpus\.jsonl:2 must have at least 2 tokens, got 0"):
        tokenize_corpus(path, ByteTokenizer(), cache)
    assert corpora_in(cache) == []
    with path.open("a") as file:
        file.write("bad\n")
    corpus = tokenize_corpus(path, ByteTokenizer(), cache, on_bad="skip")
    assert corpus.document_ids == ("d0", "d3")
    assert corpus.report == ReadReport(num_documents=2, num_bad=1, num_short=2)
    assert len(caplog.records) == 3
    assert "corpus.jsonl:3 must have at least 2 tokens, got 1" in caplog.text


def test_a_corpus_of_short_documents_is_refused(tmp_path, cache):
    path = write_corpus(tmp_path / "corpus.jsonl", ["", "x"])
    with pytest.raises(DataError, match="must hold a document of 2 tokens or more, got 2 shorter"):
        tokenize_corpus(path, ByteTokenizer(), cache, on_bad="skip")


def test_tokens_outside_the_vocabulary_are_refused(source, cache):
    class Wrong(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(DataError, match=r"between 0 and vocab_size - 1 \(99\), got .* to 115 in"):
        tokenize_corpus(source, Wrong(), cache)


def test_many_documents_are_tokenized_in_batches_with_progress(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(token_cache, "_BATCH_CHARS", 97)
    texts = [f"document {i} " * (i % 11 + 1) for i in range(53)]
    path = write_corpus(tmp_path / "corpus.jsonl", texts)
    seen: list[TokenizeProgress] = []
    corpus = tokenize_corpus(path, ByteTokenizer(), cache, on_progress=seen.append)
    assert [ByteTokenizer().decode(corpus.document(i)) for i in range(53)] == texts
    size = path.stat().st_size
    hashed = [progress for progress in seen if progress.stage == "hash"]
    assert [progress.num_bytes for progress in hashed] == [size]
    tokenized = [progress for progress in seen if progress.stage == "tokenize"]
    assert len(tokenized) >= 7
    assert tokenized[-1].num_bytes == tokenized[-1].total_bytes == size
    assert [p.num_documents for p in tokenized] == sorted(p.num_documents for p in tokenized)
    assert tokenized[-1].num_documents == 53


class Killed(BaseException):
    """Ends a build where a crash would."""


@pytest.mark.parametrize("call", ["write", "sync", "manifest", "rename"])
def test_a_build_that_dies_leaves_nothing_that_could_be_taken_for_a_corpus(
    source, cache, monkeypatch, call
):
    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        # a killed process cleans nothing up
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        if call == "write":
            patch.setattr(ByteTokenizer, "encode_batch", die)
        elif call == "sync":
            patch.setattr(token_cache, "_sync", die)
        elif call == "manifest":
            patch.setattr(token_cache, "save_config", die)
        else:
            patch.setattr(token_cache._CorpusWriter, "_move", die)
        with pytest.raises(Killed):
            tokenize_corpus(source, ByteTokenizer(), cache)
    assert [folder.suffix for folder in corpora_in(cache)] == [".partial"]
    assert tokenize_corpus(source, ByteTokenizer(), cache).num_documents == 3


def test_partial_builds_are_removed_when_they_are_old(source, cache):
    fresh, old = cache / ".abc.0.partial", cache / ".abc.1.partial"
    for folder in (fresh, old):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"tokens")
    yesterday = time.time() - 25 * 3600
    for path in (old / "tokens.bin", old):
        os.utime(path, (yesterday, yesterday))
    tokenize_corpus(source, ByteTokenizer(), cache)
    assert fresh.exists()
    assert not old.exists()


@pytest.mark.parametrize(
    "name", ["manifest.json", "tokens.bin", "lengths.npy", "num_bytes.npy", "document_ids.json"]
)
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_corpus_is_refused_and_built_again(source, cache, caplog, name, content):
    corpus = tokenize_corpus(source, ByteTokenizer(), cache)
    damaged = corpus.folder / name
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"must be whole: .* Delete the folder and tokenize again"):
        TokenizedCorpus(corpus.folder)
    assert tokenize_corpus(source, ByteTokenizer(), cache).document_ids == ("d0", "d1", "d2")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Tokenizing again" in caplog.text


def test_a_corpus_of_another_format_is_refused(source, cache):
    corpus = tokenize_corpus(source, ByteTokenizer(), cache)
    manifest = corpus.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="format must be 1, got 2"):
        TokenizedCorpus(corpus.folder)


def test_a_source_that_changes_meanwhile_is_refused(source, cache):
    class Slow(ByteTokenizer):
        def encode_batch(self, texts):
            write_corpus(source, ["another text"])
            return super().encode_batch(texts)

    with pytest.raises(DataError, match=r"corpus\.jsonl must not change while it is read"):
        tokenize_corpus(source, Slow(), cache)
    assert corpora_in(cache) == []


def test_several_builds_of_one_corpus_at_once_give_one_corpus(source, cache):
    barrier = threading.Barrier(3)

    class Together(ByteTokenizer):
        def encode_batch(self, texts):
            barrier.wait(timeout=30)
            return super().encode_batch(texts)

    corpora = []
    threads = [
        threading.Thread(target=lambda: corpora.append(tokenize_corpus(source, Together(), cache)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [corpus.num_documents for corpus in corpora] == [3, 3, 3]
    assert corpora_in(cache) == [corpora[0].folder]


def test_pickling_stores_the_path_not_the_tokens(source, cache):
    corpus = tokenize_corpus(source, ByteTokenizer(), cache)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 500
    assert pickle.loads(pickled).document(1).tolist() == corpus.document(1).tolist()


def test_documents_that_do_not_exist_are_refused(source, cache):
    corpus = tokenize_corpus(source, ByteTokenizer(), cache)
    with pytest.raises(IndexError, match="index must be between 0 and 2, got 3"):
        corpus.document(3)
    with pytest.raises(IndexError, match="index must be between 0 and 2, got -1"):
        corpus.num_bytes(-1)


def test_the_default_cache_follows_the_environment(source, tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_CACHE", str(tmp_path / "home"))
    corpus = tokenize_corpus(source, ByteTokenizer())
    assert corpus.folder.parent == tmp_path / "home" / "tokens" == default_cache_dir()
    monkeypatch.delenv("BYHEART_CACHE")
    assert default_cache_dir().parts[-3:] == (".cache", "byheart", "tokens")
