import sys

import pytest
import torch

from byheart.errors import MemoryStateError
from byheart.memory.config import KnnMemoryConfig
from byheart.memory.dense import DenseStore
from byheart.memory.faiss_store import FaissStore
from byheart.models.streaming import read_tokens
from byheart.ops.search import recall
from byheart.testing.store_contract import store_contract
from byheart.testing.tiny import random_tokens, tiny_config, tiny_decoder

BATCH, KV_HEADS, HEADS, HEAD_DIM = 2, 3, 6, 17
MEMORY_SIZE, BLOCK_SIZE, TOP_K = 2500, 1024, 11

# blocks of three slots have a single list: every search is exact, and most entries are indexed
TestContract = store_contract(lambda *shape: FaissStore.empty(*shape, block_size=3))


def text_like(num_entries):
    """Keys around a few directions, as those of a text are."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(BATCH, KV_HEADS, 50, HEAD_DIM, generator=generator)
    chosen = torch.randint(50, (num_entries,), generator=generator)
    noise = torch.randn(BATCH, KV_HEADS, num_entries, HEAD_DIM, generator=generator)
    return torch.nn.functional.normalize(directions[:, :, chosen] + 0.3 * noise, dim=-1)


def fill(store, num_entries, piece=700):
    keys = text_like(num_entries)
    for start in range(0, num_entries, piece):
        part = keys[:, :, start : start + piece]
        store = store.append(part, -part, torch.ones(BATCH, part.shape[2], dtype=torch.bool))
    return store


def faiss_store(**options):
    return FaissStore.empty(
        BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, block_size=BLOCK_SIZE, **options
    )


@pytest.mark.parametrize("num_entries", [2000, 2500, 3100, 9000])
def test_search_finds_nearly_all_neighbours_and_nothing_that_was_evicted(num_entries):
    store = fill(faiss_store(), num_entries)
    exact = fill(DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM), num_entries)
    assert store.blocks
    queries = text_like(20).repeat_interleave(HEADS // KV_HEADS, dim=1)
    found, expected = store.search(queries, TOP_K), exact.search(queries, TOP_K)
    assert found.valid.all()
    assert recall(found, expected) > 0.95
    # scores are those of the ring's present content
    keys = store.gather(found.slots).keys.view(*found.slots.shape, HEAD_DIM)
    torch.testing.assert_close(found.scores, (keys * queries[:, :, :, None]).sum(-1))
    assert torch.equal(store.entry_numbers(), exact.entry_numbers())


def test_a_block_is_indexed_while_all_its_slots_are_in_use():
    def indexed(num_entries):
        return sorted({start for _, start in fill(faiss_store(), num_entries, piece=100).blocks})

    assert indexed(1023) == []
    assert indexed(1024) == [0]
    assert indexed(2048) == [0, 1024]
    assert indexed(2500) == [0, 1024, 2048]
    # entry 2500 overwrites slot 0
    assert indexed(2501) == [1024, 2048]
    assert indexed(2500 + 1024) == [0, 1024, 2048]


def test_a_reset_row_loses_its_indexes_and_the_other_keeps_them():
    store = fill(faiss_store(), MEMORY_SIZE)
    after = store.reset(torch.tensor([True, False]))
    assert {row for row, _ in after.blocks} == {1}
    assert {row for row, _ in store.blocks} == {0, 1}
    found = after.search(torch.randn(BATCH, HEADS, 3, HEAD_DIM), TOP_K)
    assert found.valid.flatten(1).any(1).tolist() == [False, True]


def test_a_loaded_store_and_a_copy_answer_the_same():
    store = fill(faiss_store(), 3100)
    queries = text_like(20)
    expected = store.search(queries, TOP_K)
    loaded = faiss_store().load_state_dict(store.state_dict())
    swapped = store.select_rows(torch.tensor([1, 0, 1]))
    for copy, order in ((loaded, [0, 1]), (store.fork(), [0, 1]), (swapped, [1, 0, 1])):
        for mine, theirs in zip(copy.search(queries[order], TOP_K), expected, strict=True):
            assert torch.equal(mine, theirs[order])


def test_bfloat16_entries_are_found():
    store = fill(faiss_store(dtype=torch.bfloat16), 3100)
    exact = fill(
        DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, dtype=torch.bfloat16), 3100
    )
    queries = text_like(20)
    assert recall(store.search(queries, TOP_K), exact.search(queries, TOP_K)) > 0.95


def test_many_neighbours_are_found_too():
    store = fill(faiss_store(), 2048)
    found = store.search(text_like(5), 2000)
    assert found.valid.all()


def test_decoder_reads_a_faiss_memory_like_a_dense_one():
    logits = []
    for store in ("dense", "faiss"):
        memory = KnnMemoryConfig(layers=(1,), memory_size=41, top_k=5, store=store)
        decoder = tiny_decoder(tiny_config(memory=memory))
        state = decoder.new_state(2)
        logits.append(read_tokens(decoder, random_tokens(2, 60), state, return_logits=True).logits)
    torch.testing.assert_close(*logits)


def test_a_used_up_store_is_refused():
    store = fill(faiss_store(), 5)
    fill(store, 5)
    with pytest.raises(MemoryStateError, match="must not be used after it was committed"):
        store.search(text_like(1), 1)


def test_more_neighbours_than_slots_are_refused():
    with pytest.raises(ValueError, match=r"number of memory slots \(2500\), got 2501"):
        faiss_store().search(text_like(1), MEMORY_SIZE + 1)


def test_blocks_have_at_least_one_slot():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        FaissStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, block_size=0)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'byheart\[faiss\]'.*store='dense'"):
        faiss_store()
