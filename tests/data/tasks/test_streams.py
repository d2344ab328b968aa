import json
import lzma

import numpy as np
import pytest

from byheart.data.tasks import streams
from byheart.data.tasks.streams import (
    PeriodicStream,
    ShuffledStream,
    Stories,
    background_path,
    read_background,
)
from byheart.data.tokenize import ByteTokenizer
from byheart.errors import DataError


def test_a_shuffled_stream_repeats_no_token_before_all_were_read(words, numbered):
    stories = Stories(read_background(numbered, "train"), words)
    assert len(stories.ids) == 400
    starts = []
    for seed in range(20):
        stream = ShuffledStream(stories, (seed,))
        for cycle in range(3):
            ids = stream.read(400 * cycle, 400 * (cycle + 1))
            assert sorted(ids.tolist()) == sorted(stories.ids.tolist())
        starts.append(stream.read(0, 1)[0])
        # within a story the order stays: of 400 steps all but those between stories go on by one
        steps = np.diff(words.encode(words.decode(stream.read(0, 400))))
        assert (steps != 1).sum() <= 5
    assert len(set(starts)) > 15


def test_later_rounds_have_another_order(words, numbered):
    stream = ShuffledStream(Stories(read_background(numbered, "train"), words), (3,))
    first, *later = (stream.read(400 * i, 400 * (i + 1)).tolist() for i in range(5))
    assert len({tuple(round_) for round_ in later}) > 1
    assert first not in later


def test_pieces_of_a_stream_are_those_of_the_whole(words, numbered, article):
    stories = Stories(read_background(numbered, "train"), words)
    for stream in (ShuffledStream(stories, (5,)), PeriodicStream(article, words)):
        whole = stream.read(0, 1000)
        for start, stop in [(0, 0), (0, 1), (17, 18), (399, 401), (250, 990), (7, 7), (803, 1000)]:
            np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])


def test_a_periodic_stream_has_the_tokens_of_the_repeated_text(words, article):
    stream = PeriodicStream(article, words)
    expected = words.encode(article * 9)[:150]
    np.testing.assert_array_equal(stream.read(0, 150), expected)
    assert "endsWho" in words.decode(stream.read(0, 150))


def test_a_stream_costs_the_same_anywhere(words, numbered, article):
    stories = Stories(read_background(numbered, "train"), words)
    for stream in (ShuffledStream(stories, (5,)), PeriodicStream(article, words)):
        assert len(stream.read(10**12, 10**12 + 3)) == 3


def test_the_background_that_comes_along_is_cc0_and_disjoint():
    ids, num_bytes, num_chars = {}, 0, {}
    for name in ("train", "more", "validation"):
        path = background_path(name)
        num_bytes += path.stat().st_size
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        assert {record["licence"] for record in records} == {"CC0-1.0"}
        readme = (path.parent / "README.md").read_text(encoding="utf-8")
        for record in records:
            _, repository, place = record["source"].split(":")
            assert repository in readme
            assert place.removeprefix("src/epub/text/").removesuffix(".xhtml") in readme
        ids[name] = {record["id"] for record in records}
        num_chars[name] = sum(len(record["text"]) for record in records)
    assert len(set.union(*ids.values())) == sum(map(len, ids.values()))
    assert num_bytes < 2_200_000
    assert min(num_chars.values()) > 550_000
    few, more = (read_background(None, "train", more=more) for more in (False, True))
    assert more[: len(few)] == few
    assert (len(few), len(more)) == (len(ids["train"]), len(ids["train"]) + len(ids["more"]))
    assert sum(map(len, more)) > 11 * sum(map(len, few))


def test_only_training_has_more_stories(numbered):
    with pytest.raises(ValueError, match=r"more_stories must be false .*split='valid.*=None\. Set"):
        read_background(None, "validation", more=True)
    with pytest.raises(
        ValueError, match=r"more_stories .* split='train' and .*lines\.jsonl'\. Set"
    ):
        read_background(numbered, "train", more=True)


def test_a_background_without_text_is_refused(write_lines, words, monkeypatch, tmp_path):
    empty = write_lines({"text": " \n"}, {"text": ""})
    with pytest.raises(
        DataError, match=r"background must hold text, and .*lines\.jsonl holds none"
    ):
        read_background(empty, "train")
    with pytest.raises(DataError, match="must be an existing file or folder"):
        read_background("missing", "train")
    monkeypatch.setattr(streams.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"must lie at .*train\.jsonl\.xz, and does not"):
        read_background(None, "train")


def test_a_tokenizer_that_gives_no_tokens_is_refused():
    class Silent(ByteTokenizer):
        def encode(self, text):
            return np.zeros(0, dtype=np.int32)

    with pytest.raises(DataError, match="that the tokenizer knows, got no token"):
        Stories(["a text"], Silent())
    with pytest.raises(DataError, match="that the tokenizer knows, got 'a text'"):
        PeriodicStream("a text", Silent())
