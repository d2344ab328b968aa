import pytest
import torch

from byheart.errors import MemoryStateError
from byheart.memory.dense import DenseStore
from byheart.testing.store_contract import store_contract

BATCH, KV_HEADS, HEADS, MEMORY_SIZE, HEAD_DIM = 3, 2, 4, 13, 5


TestContract = store_contract(DenseStore.empty)


def filled(num_entries=7, **options):
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, **options)
    return store.append(*entries(num_entries))


def entries(num_entries, batch=BATCH):
    keys, values = torch.randn(2, batch, KV_HEADS, num_entries, HEAD_DIM)
    return keys, values, torch.ones(batch, num_entries, dtype=torch.bool)


def test_bfloat16_memory_keeps_rounded_entries_and_finds_them():
    keys, values, keep = entries(7)
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    store = store.append(keys, values, keep)
    queries = torch.randn(BATCH, KV_HEADS, 3, HEAD_DIM)
    found = store.search(queries, 4)
    exact = (queries @ keys.bfloat16().float().transpose(-1, -2)).topk(4)
    assert torch.equal(found.slots, exact.indices)
    torch.testing.assert_close(found.scores, exact.values)
    gathered = store.gather(found.slots).values.view(*found.slots.shape, HEAD_DIM)
    for head in range(KV_HEADS):
        rounded = values[0, head, found.slots[0, head]].bfloat16()
        assert torch.equal(gathered[0, head], rounded)


def test_more_neighbours_than_entries_marks_the_rest_invalid():
    found = filled(4).search(torch.randn(BATCH, HEADS, 3, HEAD_DIM), MEMORY_SIZE)
    assert found.scores.shape == (BATCH, HEADS, 3, MEMORY_SIZE)
    assert (found.valid.sum(-1) == 4).all()
    assert found.valid[..., :4].all()


def test_rows_are_strangers():
    keys, values, keep = entries(2 * MEMORY_SIZE + 3)
    keep &= torch.rand(keep.shape) < 0.6
    queries = torch.randn(BATCH, HEADS, 3, HEAD_DIM)
    scale = torch.ones(HEADS)
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM)
    together = store.append(keys, values, keep).attend(queries, scale, 5)
    for row in range(BATCH):
        alone = DenseStore.empty(1, KV_HEADS, MEMORY_SIZE, HEAD_DIM)
        mine = slice(row, row + 1)
        read = alone.append(keys[mine], values[mine], keep[mine]).attend(queries[mine], scale, 5)
        torch.testing.assert_close(read.output, together.output[mine])
        assert torch.equal(read.found.slots, together.found.slots[mine])


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.append(*entries(1)),
        lambda store: store.search(torch.randn(BATCH, HEADS, 1, HEAD_DIM), 1),
        lambda store: store.gather(torch.zeros(BATCH, HEADS, 1, 1, dtype=torch.long)),
        lambda store: store.attend(torch.randn(BATCH, HEADS, 1, HEAD_DIM), torch.ones(HEADS), 1),
        lambda store: store.select_rows(torch.tensor([0])),
        lambda store: store.fork(),
        lambda store: store.to(torch.device("cpu")),
        lambda store: store.state_dict(),
        lambda store: store.load_state_dict(filled().state_dict()),
        lambda store: store.require_current(),
    ],
    ids=[
        "append",
        "search",
        "gather",
        "attend",
        "select_rows",
        "fork",
        "to",
        "state_dict",
        "load_state_dict",
        "require_current",
    ],
)
def test_a_used_up_store_is_refused(use):
    store = filled()
    newer = store.append(*entries(1))
    with pytest.raises(MemoryStateError, match="must not be used after it was committed"):
        use(store)
    use(newer)


def test_of_two_stores_over_the_same_slots_only_one_may_write():
    store = filled()
    reset = store.reset(torch.tensor([True, False, False]))
    reset.append(*entries(1))
    with pytest.raises(MemoryStateError, match="must not be used after it was committed"):
        store.append(*entries(1))


def test_backward_after_the_commit_is_refused():
    store = filled()
    queries = torch.randn(BATCH, HEADS, 3, HEAD_DIM, requires_grad=True)
    output = store.attend(queries, torch.ones(HEADS), 4).output
    store.append(*entries(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_options_survive_every_change():
    options = {"num_buckets": 13, "empty_as_zero": True}
    store = filled(**options)
    for changed in (
        store.reset(torch.tensor([True, False, False])),
        store.fork(),
        store.select_rows(torch.tensor([1, 1])),
        filled(**options).load_state_dict(store.state_dict()),
        store.append(*entries(2)),
    ):
        assert (changed.num_buckets, changed.empty_as_zero) == (13, True)


def test_empty_slots_can_count_as_zeros():
    keys, values, keep = entries(4)
    store = DenseStore.empty(
        BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM, num_buckets=MEMORY_SIZE, empty_as_zero=True
    ).append(keys, values, keep)
    queries = torch.randn(BATCH, KV_HEADS, 3, HEAD_DIM)
    # 13 slots are retrieved: four entries, and nine with score and value zero
    weights = (queries @ keys.transpose(-1, -2)).exp()
    expected = weights @ values / (weights.sum(-1, keepdim=True) + MEMORY_SIZE - 4)
    read = store.attend(queries, torch.ones(KV_HEADS), MEMORY_SIZE)
    torch.testing.assert_close(read.output, expected)


def test_saved_entries_of_a_wrapped_ring_need_the_same_memory_size():
    saved = filled(MEMORY_SIZE + 2).state_dict()
    larger = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE + 1, HEAD_DIM)
    with pytest.raises(MemoryStateError, match=r"shape \[3, 2, 14, 5\], got \[3, 2, 13, 5\]"):
        larger.load_state_dict(saved)
    # nothing was changed by the refused call
    assert larger.append(*entries(1)).num_written.tolist() == [1] * BATCH


def test_saved_entries_of_other_rows_are_refused():
    saved = filled().select_rows(torch.tensor([0])).state_dict()
    store = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE, HEAD_DIM)
    with pytest.raises(MemoryStateError, match="store of the shape it was saved from"):
        store.load_state_dict(saved)


def test_saved_entries_that_never_wrapped_fit_a_larger_memory():
    store = filled(4)
    larger = DenseStore.empty(BATCH, KV_HEADS, MEMORY_SIZE + 1, HEAD_DIM)
    larger = larger.load_state_dict(store.state_dict())
    queries = torch.randn(BATCH, HEADS, 3, HEAD_DIM)
    for mine, theirs in zip(larger.search(queries, 3), store.search(queries, 3), strict=True):
        torch.testing.assert_close(mine, theirs)
