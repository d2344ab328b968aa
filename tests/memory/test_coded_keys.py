"""A ring with codes beside it answers as one without, whatever happens to the ring."""

from dataclasses import replace

import hypothesis
import pytest
import torch

from byheart.memory import coded_keys
from byheart.memory.age import AgeBias
from byheart.memory.dense import DenseStore, Lease
from byheart.memory.ring import RingCursor
from byheart.ops.key_codes import code_product, encode_blocks, new_codes
from byheart.testing.store_contract import store_contract

needs_codes = pytest.mark.skipif(code_product() is None, reason="needs a product of codes")

# 16 blocks: with more than TOP_K of them, codes discard entries
BATCH, KV_HEADS, HEADS, MEMORY_SIZE, HEAD_DIM, TOP_K = 3, 2, 4, 1009, 7, 3


@pytest.fixture(autouse=True)
def _codes_for_everything(monkeypatch):
    monkeypatch.setattr(coded_keys, "_MIN_ENTRIES", 1)
    monkeypatch.setattr(coded_keys, "_MIN_HEAD_DIM", 2)
    monkeypatch.setattr(coded_keys, "_MAX_QUERIES", 100)


@needs_codes
class TestContract(store_contract(DenseStore.empty)):  # type: ignore[misc]
    settings = hypothesis.settings(max_examples=10, stateful_step_count=20, deadline=None)


def entries(num_entries, batch=BATCH):
    keys, values = torch.randn(2, batch, KV_HEADS, num_entries, HEAD_DIM)
    return keys, values, torch.rand(batch, num_entries) < 0.8


def full_store(searched=True):
    """A ring that has gone round once, with codes if it was searched."""
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM)
    keys, values, _ = entries(MEMORY_SIZE)
    store = store.append(keys, values, torch.ones(BATCH, MEMORY_SIZE, dtype=torch.bool))
    if searched:
        store.search(torch.randn(BATCH, HEADS, 1, HEAD_DIM), TOP_K)
    return store


def without_codes(store, monkeypatch, queries, slope):
    with monkeypatch.context() as patch:
        patch.setattr(coded_keys, "_MIN_ENTRIES", 10**9)
        return store.attend(queries, torch.full((HEADS,), 3.0), TOP_K, slope)


def assert_same_answers(store, monkeypatch, slope=0.0):
    queries = torch.randn(store.keys.shape[0], HEADS, 1, HEAD_DIM)
    read = store.attend(queries, torch.full((HEADS,), 3.0), TOP_K, slope)
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
    for num_entries in (1, 90, 564, 3, 450, 2 * MEMORY_SIZE + 5, 31):
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
    loaded = loaded.append(*entries(420))
    assert_same_answers(loaded, monkeypatch, slope)
    loaded = loaded.load_state_dict(store.state_dict())
    assert_same_answers(loaded, monkeypatch, slope)


@needs_codes
def test_codes_kept_up_by_writes_are_those_made_anew():
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM).append(*entries(100))
    store.search(torch.randn(BATCH, HEADS, 1, HEAD_DIM), 3)
    for num_entries in (50, MEMORY_SIZE, 413):
        store = store.append(*entries(num_entries))
    kept = store._coded.of(store.keys, store.cursor.num_used())
    fresh = new_codes(store.keys, kept.centers)
    for row in range(BATCH):
        encode_blocks(fresh, store.keys, row, range(kept.scales.shape[2]))
    for one, other in zip(kept, fresh, strict=True):
        assert torch.equal(one, other)


def test_codes_are_made_for_few_queries_only(monkeypatch):
    monkeypatch.setattr(coded_keys, "_MAX_QUERIES", 4)
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM).append(*entries(100))
    store.search(torch.randn(BATCH, HEADS, 3, HEAD_DIM), 3)
    assert store._coded._made is None
    store.search(torch.randn(BATCH, HEADS, 2, HEAD_DIM), 3)
    assert (store._coded._made is not None) == (code_product() is not None)


@needs_codes
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_codes_follow_writes_whatever_columns_are_kept(first, last, monkeypatch):
    store = full_store()
    keys, values, keep = entries(70)
    keep[:], keep[:, 0], keep[:, -1] = True, first, last
    # far larger than all others: every query finds some of them, or their opposites
    store = store.append(9 * keys, values, keep)
    assert_same_answers(store, monkeypatch)


@needs_codes
def test_a_reset_store_shares_its_codes_with_the_one_before(monkeypatch):
    store = full_store(searched=False)
    reset = store.reset(torch.tensor([True, False, False]))
    assert_same_answers(reset, monkeypatch)
    assert_same_answers(store.append(*entries(400)), monkeypatch)


@needs_codes
def test_a_write_encodes_what_it_has_changed_and_no_more(monkeypatch):
    encoded, encode = [], coded_keys.encode_blocks

    def spy(codes, keys, row, blocks):
        encoded.append((row, *blocks))
        encode(codes, keys, row, blocks)

    monkeypatch.setattr(coded_keys, "encode_blocks", spy)
    store, queries = full_store(), torch.randn(BATCH, HEADS, 1, HEAD_DIM)
    assert encoded == [(row, *range(16)) for row in range(BATCH)]
    keys, values, keep = entries(30)
    # the ring is full: row 0 writes its first slots, row 2 the last of them and the first
    keep[:], keep[1] = True, False
    store = store.append(keys, values, keep & torch.tensor([[True], [False], [False]]))
    store = replace(store, cursor=replace(store.cursor, num_written=store.num_written * 0 + 990))
    store = store.append(keys, values, keep & torch.tensor([[False], [False], [True]]))
    store = replace(
        store, cursor=replace(store.cursor, num_written=store.num_written * 0 + MEMORY_SIZE)
    )
    encoded.clear()
    store.search(queries, 3)
    assert encoded == [(0, 0), (2, 0), (2, 15)]
    store.search(queries, 3)
    assert len(encoded) == 3


@needs_codes
def test_codes_made_in_inference_mode_can_be_changed_outside_of_it(monkeypatch):
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM).append(*entries(650))
    with torch.inference_mode():
        store.search(torch.randn(BATCH, HEADS, 1, HEAD_DIM), 3)
    store = store.append(*entries(90))
    assert_same_answers(store, monkeypatch)
    with torch.inference_mode():
        copy = store.fork().append(*entries(30))
        assert_same_answers(copy, monkeypatch)
    assert_same_answers(copy, monkeypatch)


@needs_codes
def test_keys_that_others_have_written_to_are_encoded_anew(monkeypatch):
    store = full_store()
    store.keys.mul_(-1)
    assert_same_answers(store, monkeypatch)
    store.keys.copy_(torch.randn(store.keys.shape))
    assert_same_answers(store.append(*entries(5)), monkeypatch)
    other = replace(store, keys=torch.randn(store.keys.shape), _lease=Lease())
    assert_same_answers(other, monkeypatch)


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
