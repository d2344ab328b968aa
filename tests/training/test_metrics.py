"""The unfinished log line: what it says over an interruption and over several processes."""

import pytest
import torch

from byheart.training import metrics
from byheart.training.metrics import Meter

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What time it is, as the only number of a list."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def read(meter: Meter, num_read: int, *, share: float | None = None) -> None:
    meter.add(torch.tensor(2.0 * num_read), torch.tensor(num_read), torch.tensor(num_read))
    if share is not None:
        meter.add_write_share(torch.tensor(share, requires_grad=True))


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


def test_the_rate_of_a_line_that_spans_an_interruption_is_that_since_the_restart(clock):
    before = Meter(CPU)
    read(before, 7000)
    clock[0] = 100.0
    state = before.state()
    resumed = Meter(CPU)
    resumed.load_state(state)
    resumed.restart_clock()
    clock[0] = 102.0
    read(resumed, 10)
    line = resumed.take(alone)
    # what was read before the restart counts, but not for the rate
    assert line == {"loss": 2.0, "num_tokens": 7010, "tokens_per_second": 5.0}
    clock[0] = 103.0
    read(resumed, 3)
    assert resumed.take(alone)["tokens_per_second"] == 3.0


def test_what_a_checkpoint_keeps_does_not_depend_on_interruptions():
    whole, resumed = Meter(CPU), Meter(CPU)
    read(whole, 11, share=0.5)
    resumed.load_state(whole.state())
    for meter in (whole, resumed):
        read(meter, 5, share=0.25)
    torch.testing.assert_close(resumed.state(), whole.state(), atol=0, rtol=0)


def test_the_share_that_is_rewritten_is_the_mean_over_all_processes_and_interruptions(clock):
    clock[0] = 1.0
    first, second = Meter(CPU), Meter(CPU)
    read(first, 1, share=0.5)
    resumed = Meter(CPU)
    resumed.load_state(first.state())
    read(resumed, 1, share=1.0)
    read(second, 1, share=0.0)
    read(second, 1, share=0.25)
    clock[0] = 2.0
    line = resumed.take(lambda sums: sums + second.sums)
    assert line["write_share"] == (0.5 + 1.0 + 0.0 + 0.25) / 4
    read(resumed, 1)
    clock[0] = 3.0
    # nothing is left of the line before, and a model that rewrites nothing says nothing
    assert "write_share" not in resumed.take(alone)


def test_what_earlier_versions_kept_is_gone_on_with(clock):
    meter = Meter(CPU)
    # nats, predicted tokens, tokens read since the last line, and since the beginning
    meter.load_state(torch.tensor([6.0, 3.0, 5.0, 700.0], dtype=torch.float64))
    read(meter, 1)
    clock[0] = 1.0
    assert meter.take(alone) == {"loss": 2.0, "num_tokens": 701, "tokens_per_second": 1.0}
