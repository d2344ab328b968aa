import json

import pytest

from byheart.data.stats import LengthPercentile, LengthShare, corpus_stats
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import ByteTokenizer


class NoStart(ByteTokenizer):
    start_id = None


@pytest.fixture
def source(tmp_path):
    # 4, 9 and 2,986 tokens with the start token
    path = tmp_path / "corpus.jsonl"
    texts = ["abc", "ÄÖÜß", "x" * 2985]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_stats_can_be_checked_by_hand(source, tmp_path):
    stats = corpus_stats(tokenize_corpus(source, ByteTokenizer(), tmp_path), segment_length=5)
    assert (stats.num_documents, stats.num_tokens, stats.num_bytes) == (3, 2999, 2996)
    assert stats.bytes_per_token == 1.0
    assert stats.length_percentiles[0] == LengthPercentile(percent=0, tokens=4)
    assert stats.length_percentiles[3] == LengthPercentile(percent=50, tokens=9)
    assert stats.length_percentiles[-1] == LengthPercentile(percent=100, tokens=2986)
    assert stats.length_shares[0] == LengthShare(longer_than_tokens=2048, token_share=2986 / 2999)
    assert stats.length_shares[-1] == LengthShare(longer_than_tokens=65_536, token_share=0.0)
    # 3 + 8 + 2,985 inputs in 1 + 2 + 597 segments of 5
    assert stats.padding_share == pytest.approx(4 / 3000)


def test_bytes_per_token_count_only_tokens_of_the_text(source, tmp_path):
    with_start = corpus_stats(tokenize_corpus(source, ByteTokenizer(), tmp_path))
    without = corpus_stats(tokenize_corpus(source, NoStart(), tmp_path / "other"))
    assert with_start.bytes_per_token == without.bytes_per_token == 1.0
    assert with_start.num_tokens == without.num_tokens + 3


def test_stats_fit_into_json(source, tmp_path):
    stats = corpus_stats(tokenize_corpus(source, ByteTokenizer(), tmp_path))
    loaded = json.loads(json.dumps(stats.to_dict()))
    assert loaded["num_documents"] == 3
    assert loaded["length_percentiles"][0] == {"percent": 0, "tokens": 4}


def test_an_empty_segment_is_refused(source, tmp_path):
    corpus = tokenize_corpus(source, ByteTokenizer(), tmp_path)
    with pytest.raises(ValueError, match="segment_length must be at least 1, got 0"):
        corpus_stats(corpus, segment_length=0)
