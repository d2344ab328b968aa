import io
import json
import math

import pytest
from rich.console import Console

from byheart.evaluation.result import (
    POSITION_EDGES,
    DocumentLoss,
    Measurement,
    PerplexityResult,
    PositionBucket,
    compare,
    short_number,
)


def measurement(
    memory_size: int, nats: float, *, xl_cache_length: int = 512, num_bytes: int | None = 300
) -> Measurement:
    """One document of 100 tokens, all of them in the first bucket."""
    ends = (*POSITION_EDGES[1:], None)
    return Measurement(
        memory_size=memory_size,
        xl_cache_length=xl_cache_length,
        documents=(DocumentLoss(document_id="a", num_tokens=100, nats=nats, num_bytes=num_bytes),),
        buckets=tuple(
            PositionBucket(
                start=start,
                end=end,
                num_tokens=100 if start == 0 else 0,
                nats=nats if start == 0 else 0.0,
            )
            for start, end in zip(POSITION_EDGES, ends, strict=True)
        ),
        seconds=4.0,
        peak_state_bytes=3 << 20,
    )


def result(*measurements: Measurement) -> PerplexityResult:
    return PerplexityResult(
        measurements=measurements, segment_length=512, corpus_fingerprint="corpus"
    )


def test_numbers_follow_from_nats_tokens_and_bytes():
    one = measurement(0, 100 * math.log(12))
    assert one.nats_per_token == pytest.approx(math.log(12))
    assert one.perplexity == pytest.approx(12)
    # 100 tokens of log2(12) bits each, spread over 300 bytes
    assert one.bits_per_byte == pytest.approx(math.log2(12) / 3)
    assert one.tokens_per_second == 25
    assert one.buckets[0].nats_per_token == pytest.approx(math.log(12))
    assert math.isnan(one.buckets[1].nats_per_token)


def test_change_is_relative_to_the_first_memory_with_the_same_cache():
    measurements = [
        measurement(0, 100 * math.log(10)),
        measurement(8192, 100 * math.log(9)),
        measurement(0, 100 * math.log(20), xl_cache_length=0),
        measurement(8192, 100 * math.log(22), xl_cache_length=0),
    ]
    comparisons = compare(measurements)
    changes = [comparison.perplexity_change for comparison in comparisons]
    assert changes == pytest.approx([0, -0.1, 0, 0.1])
    assert comparisons[3].baseline is measurements[2]


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1e6])
def test_a_diverged_model_still_gives_tables_and_json(nats):
    diverged = result(measurement(0, 460.5), measurement(64, nats, num_bytes=None))
    first, second = json.loads(json.dumps(diverged.to_dict(), allow_nan=False))["measurements"]
    assert first["perplexity"] == pytest.approx(math.exp(4.605))
    assert second["perplexity"] is None
    assert second["perplexity_change"] is None
    assert second["bits_per_byte"] is None
    assert compare(diverged.measurements)[1].perplexity_change is None
    assert "| 64 | 512 | nan |" in diverged.to_markdown() or "| inf |" in diverged.to_markdown()


def test_dict_holds_documents_and_buckets():
    (only,) = result(measurement(0, 200.0)).to_dict()["measurements"]
    assert only["documents"] == [
        {
            "document_id": "a",
            "num_tokens": 100,
            "num_bytes": 300,
            "nats_per_token": 2.0,
            "bits_per_byte": pytest.approx(2 / math.log(2) / 3),
        }
    ]
    assert only["buckets"][0] == {
        "start": 0, "end": 512, "num_tokens": 100, "nats_per_token": 2.0,
    }  # fmt: skip
    assert only["buckets"][-1] == {
        "start": 32_768, "end": None, "num_tokens": 0, "nats_per_token": None,
    }  # fmt: skip


def test_markdown_shows_sizes_changes_and_gaps():
    text = result(
        measurement(0, 100 * math.log(10)),
        measurement(8192, 100 * math.log(9), num_bytes=None),
        measurement(8192, 100 * math.log(16), xl_cache_length=0),
    ).to_markdown()
    assert "| none | 512 | 10 | +0.0% | 2.3026 | 1.1073 | 25 | 3.0 |" in text
    assert "| 8K | 512 | 9 | -10.0% | 2.1972 | - | 25 | 3.0 |" in text
    assert "| 8K | none | 2.7726 | - | - | - | - |" in text
    assert "| tokens |  | 100 | 0 | 0 | 0 | 0 |" in text
    assert "| memory | XL cache | 0-512 | 512-2K | 2K-8K | 8K-32K | 32K+ |" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables[:5]) == {9}
    assert set(tables[5:]) == {8}


def test_terminal_tables_fit_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result(measurement(65_536, 3e2), measurement(131_072, 2e2)).to_rich())
    text = console.export_text()
    assert "perplexity" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("count", "name"),
    [(0, "0"), (512, "512"), (1536, "1.5K"), (8192, "8K"), (10_000, "10,000"),
     (65_537, "65,537"), (1 << 20, "1M"), (3 << 29, "1.5G")],
)  # fmt: skip
def test_short_numbers_lose_nothing(count, name):
    assert short_number(count) == name


def test_no_measurements_give_empty_tables():
    empty = result()
    assert empty.to_dict()["measurements"] == []
    assert empty.to_markdown()
