"""A ring with codes beside it answers as one without, whatever happens to the ring."""

import pytest
import torch

from byheart.memory import coded_keys
from byheart.memory.age import AgeBias
from byheart.memory.dense import DenseStore
from byheart.memory.ring import RingCursor
from byheart.ops.key_codes import encode_blocks, multiplies_codes, new_codes
from byheart.testing.store_contract import store_contract

needs_codes = pytest.mark.skipif(not multiplies_codes(), reason="needs 8-bit products")

BATCH, KV_HEADS, HEADS, MEMORY_SIZE, HEAD_DIM = 3, 2, 4, 211, 7


@pytest.fixture(autouse=True)
def _codes_for_everything(monkeypatch):
    monkeypatch.setattr(coded_keys, "_MIN_ENTRIES", 1)
    monkeypatch.setattr(coded_keys, "_MIN_HEAD_DIM", 2)
    monkeypatch.setattr(coded_keys, "_MAX_QUERIES", 100)


@needs_codes
class TestContract(store_contract(DenseStore.empty)):  # type: ignore[misc]
    pass


def entries(num_entries, batch=BATCH):
    keys, values = torch.randn(2, batch, KV_HEADS, num_entries, HEAD_DIM)
    return keys, values, torch.rand(batch, num_entries) < 0.8


def without_codes(store, monkeypatch, queries, slope):
    with monkeypatch.context() as patch:
        patch.setattr(coded_keys, "_MIN_ENTRIES", 10**9)
        return store.attend(queries, torch.full((HEADS,), 3.0), 5, slope)


def assert_same_answers(store, monkeypatch, slope=0.0):
    queries = torch.randn(store.keys.shape[0], HEADS, 1, HEAD_DIM)
    read = store.attend(queries, torch.full((HEADS,), 3.0), 5, slope)
    expected = without_codes(store, monkeypatch, queries, slope)
    torch.testing.assert_close(read.output, expected.output)
    torch.testing.assert_close(read.logsumexp, expected.logsumexp)
    assert torch.equal(read.found.slots, expected.found.slots)
    assert torch.equal(read.found.valid, expected.found.valid)


@needs_codes
@pytest.mark.parametrize("slope", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_stay_the_same_through_writes_resets_and_copies(dtype, slope, monkeypatch):
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, dtype=dtype)
    for num_entries in (1, 90, 64, 3, 150, 2 * MEMORY_SIZE + 5, 31):
        store = store.append(*entries(num_entries))
        assert_same_answers(store, monkeypatch, slope)
    store = store.reset(torch.tensor([False, True, False]))
    assert_same_answers(store, monkeypatch, slope)
    store = store.append(*entries(77))
    assert_same_answers(store, monkeypatch, slope)
    copy = store.select_rows(torch.tensor([2, 2, 0]))
    store = store.append(*entries(9))
    copy = copy.append(*entries(50))
    assert_same_answers(store, monkeypatch, slope)
    assert_same_answers(copy, monkeypatch, slope)
    loaded = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, dtype=dtype)
    loaded = loaded.append(*entries(20))
    assert_same_answers(loaded, monkeypatch, slope)
    loaded = loaded.load_state_dict(store.state_dict())
    assert_same_answers(loaded, monkeypatch, slope)


@needs_codes
def test_codes_kept_up_by_writes_are_those_made_anew():
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM).append(*entries(100))
    store.search(torch.randn(BATCH, HEADS, 1, HEAD_DIM), 3)
    kept = store._coded.of(store.keys, store.cursor.num_used())
    for num_entries in (50, MEMORY_SIZE, 13):
        store = store.append(*entries(num_entries))
    fresh = new_codes(store.keys, kept.centers)
    for row in range(BATCH):
        encode_blocks(fresh, store.keys, row, range(kept.scales.shape[2]))
    for one, other in zip(kept, fresh, strict=True):
        assert torch.equal(one, other)


def test_codes_are_made_for_few_queries_only(monkeypatch):
    monkeypatch.setattr(coded_keys, "_MAX_QUERIES", 4)
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM).append(*entries(100))
    store.search(torch.randn(BATCH, HEADS, 3, HEAD_DIM), 3)
    assert store._coded._codes is None


@pytest.mark.parametrize("memory_size", [1, 5, 64, 211])
@pytest.mark.parametrize("block_size", [1, 3, 64, 300])
def test_ages_of_blocks_bound_the_ages_of_their_slots(memory_size, block_size):
    counts = torch.tensor([0, 1, 5, 63, 64, 65, 211, 212, 640, 1000])
    cursor = RingCursor(memory_size=memory_size, num_written=counts)
    youngest, oldest = cursor.ages_of_blocks(block_size)
    for block in range(youngest.shape[1]):
        ages = cursor.ages()[:, block * block_size : (block + 1) * block_size]
        assert torch.equal(ages.amin(1), youngest[:, block])
        assert torch.equal(ages.amax(1), oldest[:, block])


def test_bias_of_slots_and_blocks_is_that_of_all_slots():
    cursor = RingCursor(memory_size=MEMORY_SIZE, num_written=torch.tensor([3, 211, 999]))
    bias = AgeBias(cursor, 0.7)
    dense = bias.dense()
    row_ids, slots = torch.randint(3, (17,)), torch.randint(MEMORY_SIZE, (17,))
    torch.testing.assert_close(bias.at(row_ids, slots), dense[row_ids, slots])
    low, high = bias.of_blocks(64)
    for block, part in enumerate(dense.split(64, dim=1)):
        torch.testing.assert_close(part.amin(1), low[:, block])
        torch.testing.assert_close(part.amax(1), high[:, block])
