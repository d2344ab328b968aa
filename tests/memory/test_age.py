"""Age of retrieved entries: counted by the ring, weighed by a slope."""

import pytest
import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.memory.layout import MemoryLayout
from byheart.memory.ring import RingCursor
from byheart.memory.stores import empty_stores
from byheart.ops import reference

ROWS, HEADS, HEAD_DIM, SIZE, QUERIES, TOP_K = 2, 3, 5, 11, 4, 7


def make_store(kind):
    knn = KnnMemoryConfig(layers=(0,), memory_size=SIZE, top_k=TOP_K, store=kind)
    layout = MemoryLayout(
        num_layers=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, segment_length=3, xl_cache_length=0,
        knn_memory=knn,
    )  # fmt: skip
    return empty_stores(layout, ROWS, None, None, None)[0]


def fill(store, num_writes):
    for _ in range(num_writes):
        keys, values = torch.randn(2, ROWS, HEADS, 3, HEAD_DIM)
        store = store.append(keys, values, torch.tensor([[True] * 3, [True, False, True]]))
    return store


def test_ages_count_back_from_the_newest_through_wraps():
    cursor = RingCursor(memory_size=5, num_written=torch.tensor([3, 13]))
    held = [[0, 1, 2], [3, 4, 0, 1, 2]]  # oldest first: row 1 has written slots 3, 4, 0, 1, 2 last

    for row, slots in enumerate(held):
        ages = cursor.ages()[row]
        assert ages[slots].tolist() == list(range(len(slots), 0, -1))
        assert sorted(ages.tolist()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["dense", "faiss"])
@pytest.mark.parametrize("num_writes", [2, 9])
def test_attention_with_slope_is_that_with_the_ages_written_out(kind, num_writes):
    torch.manual_seed(0)
    store = fill(make_store(kind), num_writes)
    queries = torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM, requires_grad=True)
    scale = torch.rand(HEADS) + 1

    read = store.attend(queries, scale, TOP_K, 0.7)

    numbers, bias = store.entry_numbers(), torch.zeros(read.found.scores.shape)
    for b in range(ROWS):
        newest = int(numbers[b].max())
        for h in range(HEADS):
            for q in range(QUERIES):
                for k in range(TOP_K):
                    age = 1 + newest - int(numbers[b, read.found.slots[b, h, q, k]])
                    bias[b, h, q, k] = -0.7 * torch.tensor(float(age)).log()
    keys, values = (side[:, :, :SIZE] for side in stored(store))
    expected = reference.gather_attend(queries, scale, keys, values, read.found, bias=bias)
    torch.testing.assert_close(read.output, expected.output)
    torch.testing.assert_close(read.logsumexp, expected.logsumexp)


def stored(store):
    ring = getattr(store, "ring", store)
    return ring.keys, ring.values


def test_slope_of_zero_changes_nothing():
    torch.manual_seed(0)
    store = fill(make_store("dense"), 5)
    queries, scale = torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM), torch.ones(HEADS)

    plain = store.attend(queries, scale, TOP_K)
    weighed = store.attend(queries, scale, TOP_K, 0.0)
    preferring = store.attend(queries, scale, TOP_K, 0.5)

    assert torch.equal(plain.output, weighed.output)
    assert not torch.allclose(plain.output, preferring.output)


def test_slope_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"age_slope must be at least 0, got -0.5"):
        KnnMemoryConfig(layers=(0,), age_slope=-0.5)
