import json
import math
import sys
from contextlib import contextmanager

import matplotlib as mpl
import pytest

from byheart.errors import DataError
from byheart.evaluation import plots
from byheart.evaluation.plots import plot_loss_by_position, plot_perplexity, plot_training_curves
from byheart.evaluation.result import (
    POSITION_EDGES,
    DocumentLoss,
    Measurement,
    PerplexityResult,
    PositionBucket,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def result() -> PerplexityResult:
    """Memories 0, 8K and 64K with and without XL cache; the last bucket is empty."""
    measurements = []
    for length in (512, 0):
        for rank, size in enumerate((0, 8192, 65_536)):
            loss = 2.5 - 0.1 * rank + (0.3 if length == 0 else 0)
            counts = (512, 1536, 6144, 1001, 0)
            ends = (*POSITION_EDGES[1:], None)
            buckets = tuple(
                PositionBucket(start=start, end=end, num_tokens=count, nats=loss * count)
                for start, end, count in zip(POSITION_EDGES, ends, counts, strict=True)
            )
            document = DocumentLoss(
                document_id="a", num_tokens=9193, nats=loss * 9193, num_bytes=None
            )
            measurements.append(
                Measurement(
                    memory_size=size,
                    xl_cache_length=length,
                    documents=(document,),
                    buckets=buckets,
                    seconds=1.0,
                    peak_state_bytes=1,
                )
            )
    return PerplexityResult(
        measurements=tuple(measurements), segment_length=512, corpus_fingerprint="corpus"
    )


@pytest.fixture
def drawn(monkeypatch):
    """Keep the axes of every figure that is drawn."""
    kept = []
    draw = plots.figure_axes

    @contextmanager
    def keep(path):
        with draw(path) as axes:
            kept.append(axes)
            yield axes

    monkeypatch.setattr(plots, "figure_axes", keep)
    return kept


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 7 - step / 100}) for step in range(0, 300, 10)]
    lines.insert(3, json.dumps({"step": 20, "evaluation/perplexity": 12.5}))
    path.write_text("\n".join(lines) + '\n{"step": 300, "lo')
    return path


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_perplexity_by_memory_size_has_a_line_per_cache(result, drawn, tmp_path):
    path = plot_perplexity(result, tmp_path / "perplexity.png")
    assert path.read_bytes().startswith(PNG)
    (axes,) = drawn
    with_cache, without = axes.lines
    assert with_cache.get_xdata().tolist() == [0, 8192, 65_536]
    assert with_cache.get_ydata() == pytest.approx([math.exp(2.5 - 0.1 * i) for i in range(3)])
    assert without.get_ydata()[0] == pytest.approx(math.exp(2.8))
    assert ticks(axes.xaxis) == ["none", "8K", "64K"]
    assert axes.get_xscale() == "symlog"
    assert [line.get_label() for line in axes.lines] == ["XL cache 512", "no XL cache"]


def test_loss_by_position_leaves_out_empty_buckets(result, drawn, tmp_path):
    path = plot_loss_by_position(result, tmp_path / "positions.png")
    assert path.read_bytes().startswith(PNG)
    (axes,) = drawn
    assert ticks(axes.xaxis) == [
        "0-512\nn = 512", "512-2K\nn = 1,536", "2K-8K\nn = 6,144", "8K-32K\nn = 1,001",
    ]  # fmt: skip
    assert [len(line.get_xdata()) for line in axes.lines] == [4] * 6
    first, *_, last = axes.lines
    assert first.get_label() == "no memory, XL cache 512"
    assert last.get_label() == "memory 64K, no XL cache"
    # colour says the memory size, dashes the XL cache
    assert first.get_color() == axes.lines[3].get_color() != last.get_color()
    assert first.get_linestyle() != last.get_linestyle()


def test_training_curves_skip_other_metrics_and_a_torn_last_line(log, drawn, tmp_path):
    path = plot_training_curves([log, log], ["one", "two"], tmp_path / "training.png")
    assert path.read_bytes().startswith(PNG)
    (axes,) = drawn
    assert axes.lines[0].get_xdata().tolist() == list(range(0, 300, 10))
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(7 - 2.9)
    assert axes.get_ylabel() == "loss (nats per token)"
    plot_training_curves([log], ["one"], path, metric="evaluation/perplexity", unit="")
    assert drawn[1].get_ylabel() == "evaluation/perplexity"
    assert drawn[1].lines[0].get_ydata().tolist() == [12.5]


def test_a_diverged_measurement_leaves_a_gap(result, tmp_path):
    document = DocumentLoss(document_id="a", num_tokens=3, nats=math.inf, num_bytes=None)
    bucket = PositionBucket(start=0, end=512, num_tokens=3, nats=math.nan)
    diverged = Measurement(
        memory_size=64, xl_cache_length=512, documents=(document,), buckets=(bucket,) * 5,
        seconds=1.0, peak_state_bytes=1,
    )  # fmt: skip
    broken = PerplexityResult(
        measurements=(*result.measurements, diverged), segment_length=5, corpus_fingerprint=""
    )
    assert plot_perplexity(broken, tmp_path / "a.png").exists()
    assert plot_loss_by_position(broken, tmp_path / "b.png").exists()


def test_plots_change_no_global_setting(result, tmp_path):
    before = dict(mpl.rcParams)
    plot_perplexity(result, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_missing_matplotlib_names_the_extra(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'byheart\[plots\]'"):
        plot_perplexity(result, tmp_path / "a.png")


def test_training_curves_refuse_what_they_cannot_draw(log, tmp_path):
    out = tmp_path / "a.png"
    with pytest.raises(ValueError, match="one label per log, got 1 logs and 2 labels"):
        plot_training_curves([log], ["one", "two"], out)
    with pytest.raises(ValueError, match="one label per log, got 0 logs"):
        plot_training_curves([], [], out)
    with pytest.raises(DataError, match=r"'los' with a step, it has evaluation/perplexity, loss"):
        plot_training_curves([log], ["one"], out, metric="los")
    log.write_text('no json\n{"step": 1, "loss": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:1 must be a JSON object"):
        plot_training_curves([log], ["one"], out)
    log.write_text('[1]\n{"step": 1, "loss": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:1 must be a JSON object, got list"):
        plot_training_curves([log], ["one"], out)
    assert not out.exists()
