import pytest
import torch

from byheart.memory.ring import RingCursor


def empty_ring(memory_size, num_rows):
    return RingCursor(memory_size=memory_size, num_written=torch.zeros(num_rows, dtype=torch.long))


def test_ten_wraps_of_odd_lengths_equal_a_list():
    memory_size, num_rows = 13, 3
    ring = empty_ring(memory_size, num_rows)
    slots = torch.full((num_rows, memory_size), -1)
    lists = [[] for _ in range(num_rows)]
    lengths = iter(torch.randint(0, memory_size + 1, (1000,)).tolist())
    while min(map(len, lists)) < 10 * memory_size:
        keep = torch.rand(num_rows, next(lengths)) < 0.7
        claimed = ring.claim(keep)
        for row in range(num_rows):
            for slot in claimed[row, keep[row]].tolist():
                slots[row, slot] = len(lists[row])
                lists[row].append(len(lists[row]))
        ring = ring.advance(keep.sum(1))
        for row in range(num_rows):
            held = slots[row][ring.valid()[row]].tolist()
            assert sorted(held) == lists[row][-memory_size:]
        assert torch.equal(ring.entry_numbers(), slots)
    assert ring.num_written.tolist() == [len(entries) for entries in lists]


def test_a_write_claims_different_slots_for_kept_and_other_entries():
    ring = RingCursor(memory_size=7, num_written=torch.tensor([0, 5, 23]))
    keep = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    # kept ones first: 5 and 23 stand at slots 5 and 2 of seven
    assert ring.claim(keep).tolist() == [[0, 2, 1], [6, 0, 5], [2, 3, 4]]


def test_reset_forgets_one_row_and_leaves_the_old_cursor():
    ring = RingCursor(memory_size=5, num_written=torch.tensor([4, 9]))
    after = ring.reset(torch.tensor([True, False]))
    assert after.num_written.tolist() == [0, 9]
    assert after.valid().sum(1).tolist() == [0, 5]
    assert after.entry_numbers().tolist() == [[-1] * 5, [5, 6, 7, 8, 4]]
    assert ring.num_written.tolist() == [4, 9]


def test_a_write_longer_than_the_ring_is_refused():
    with pytest.raises(ValueError, match=r"memory_size \(5\) entries can claim slots.*got 6"):
        empty_ring(5, 2).claim(torch.ones(2, 6, dtype=torch.bool))


def test_a_ring_has_at_least_one_slot():
    with pytest.raises(ValueError, match="memory_size must be at least 1 entry per row, got 0"):
        empty_ring(0, 2)
