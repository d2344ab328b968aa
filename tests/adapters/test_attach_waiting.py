"""A model with memory asks no device for a value, and computes the same where it may not ask."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from byheart import KnnMemoryConfig, attach
from byheart.models.streaming import read_tokens
from byheart.ops import known

SEGMENT = 7
COUNTS = [7, 3, 7, 7, 5, 7]
STARTS = [True, False, True, False, False, True]


class WaitsInTransformersAlone(TorchDispatchMode):
    """Refuses operators that a host waits for; transformers asks whether masks are all of ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            files = [frame.filename for frame in traceback.extract_stack()]
            assert any(file.endswith("masking_utils.py") for file in files), f"{name} waits"
        return func(*args, **(kwargs or {}))


def make(model, cache):
    torch.manual_seed(0)
    knn = KnnMemoryConfig(layers=(1,), memory_size=17, top_k=5, age_slope=0.5)
    return attach(model, knn=knn, segment_length=SEGMENT, xl_cache_length=cache, gate_init=0.5)


def learn(memory_model, ids, *, ragged, starts_segment=False):
    """Return losses and gradients of some steps."""
    memory_model.zero_grad()
    state, losses = memory_model.new_state(2), []
    for index, segment in enumerate(ids.split(SEGMENT, dim=1)):
        rows, targets = {}, segment
        if ragged:
            num_tokens = torch.tensor([SEGMENT, COUNTS[index]])
            targets = torch.where(torch.arange(SEGMENT) < num_tokens[:, None], segment, -100)
            start = torch.tensor([index == 0, STARTS[index]])
            rows = {"num_tokens": num_tokens, "document_start": start}
            if starts_segment:
                state = state.at_segment_start(start)
        out = memory_model(segment, state=state, targets=targets, **rows)
        out.loss.backward()
        state = state.commit(out.new_entries)
        losses.append(out.token_losses.detach())
    return [torch.stack(losses), *(weight.grad.clone() for weight in memory_model.parameters())]


def decode(memory_model, ids):
    state, scores = memory_model.new_state(2), []
    for column in ids.split(1, dim=1):
        read = read_tokens(memory_model, column, state)
        state = read.state
        scores.append(read.last_logits)
    return torch.stack(scores)


@pytest.mark.parametrize(
    ("name", "cache"), [("llama", 7), ("llama", 0), ("gpt2", 0), ("gemma3", 7)]
)
def test_a_step_that_asks_nothing_computes_the_same(name, cache, tiny_model, draw, monkeypatch):
    memory_model, ids = make(tiny_model(name), cache), draw(2, 6 * SEGMENT)
    whole, ragged = (learn(memory_model, ids, ragged=ragged) for ragged in (False, True))
    decoded = decode(memory_model, ids[:, :17])
    monkeypatch.setattr(known, "values_are_known", lambda _: False)
    with WaitsInTransformersAlone():
        found = [
            learn(memory_model, ids, ragged=False),
            learn(memory_model, ids, ragged=True),
            learn(memory_model, ids, ragged=True, starts_segment=True),
        ]
        found_decoded = decode(memory_model, ids[:, :17])
    for mine, theirs in zip(found, (whole, ragged, ragged), strict=True):
        # gradients are sums over thousands of terms, in another order
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found_decoded, decoded, atol=1e-5, rtol=1e-4)
