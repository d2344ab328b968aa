import pytest
import torch

from byheart.ops import bucket_search, reference_search
from byheart.ops.bucket_search import strided_bucket_top_k
from byheart.ops.search import recall, top_k_inner_product

BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM, BUCKETS = 3, 6, 2, 5, 23, 11, 7

# float32 sums of the same products in another order
ROUNDING = {"atol": 2e-5, "rtol": 1e-5}


def make_inputs(entries=ENTRIES, dtype=torch.float32):
    queries = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM)
    keys = torch.randn(BATCH, KV_HEADS, entries, HEAD_DIM).to(dtype)
    return queries, keys, torch.ones(BATCH, entries, dtype=torch.bool)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_slow_twin(dtype, top_k, biased, monkeypatch):
    queries, keys, valid = make_inputs(dtype=dtype)
    valid[1] = torch.rand(ENTRIES) < 0.6
    valid[2] = False
    bias = 3 * torch.randn(BATCH, ENTRIES) if biased else None
    slow = reference_search.strided_bucket_top_k(queries, keys, valid, BUCKETS, top_k, bias)
    poisoned = keys.masked_fill(~valid[:, None, :, None], torch.nan)
    for max_bytes in (1, 997, 2**20):
        monkeypatch.setattr(bucket_search, "default_max_bytes", lambda _, size=max_bytes: size)
        found = strided_bucket_top_k(queries, poisoned, valid, BUCKETS, top_k, bias)
        torch.testing.assert_close(found.scores, slow.scores, **ROUNDING)
        assert torch.equal(found.slots, slow.slots)
        assert torch.equal(found.valid, slow.valid)


def test_worked_example_hides_the_second_best_of_a_bucket():
    queries, keys = torch.ones(1, 1, 1, 1), torch.tensor([5.0, 1, 4, 0, 3]).view(1, 1, 5, 1)
    valid = torch.ones(1, 5, dtype=torch.bool)
    # slots 0, 2, 4 share a bucket, so do 1 and 3
    found = strided_bucket_top_k(queries, keys, valid, 2)
    assert found.scores.flatten().tolist() == [5, 1]
    assert found.slots.flatten().tolist() == [0, 1]


def test_as_many_buckets_as_slots_is_exact():
    queries, keys, valid = make_inputs()
    valid[1, 13:] = False
    exact = top_k_inner_product(queries, keys, valid, 17)
    found = strided_bucket_top_k(queries, keys, valid, ENTRIES, 17)
    torch.testing.assert_close(found.scores, exact.scores, **ROUNDING)
    assert torch.equal(found.slots, exact.slots)
    assert torch.equal(found.valid, exact.valid)


def test_recall_is_that_of_neighbours_thrown_into_buckets():
    queries, keys = torch.randn(1, 1, 1009, HEAD_DIM), torch.randn(1, 1, 2003, HEAD_DIM)
    valid = torch.ones(1, 2003, dtype=torch.bool)
    exact = top_k_inner_product(queries, keys, valid, 32)
    expected = sum((1 - 1 / 128) ** rank for rank in range(32)) / 32
    measured = recall(strided_bucket_top_k(queries, keys, valid, 128), exact)
    # 1009 queries of 32 neighbours each: a standard error below 0.002
    assert measured == pytest.approx(expected, abs=0.01)


def test_sizes_must_fit():
    queries, keys, valid = make_inputs()
    with pytest.raises(ValueError, match=r"num_buckets must be .* slots \(23\), got 24\. Lower"):
        strided_bucket_top_k(queries, keys, valid, 24)
    with pytest.raises(ValueError, match=r"top_k must be .* buckets \(7\), got 8\. .* num_buckets"):
        strided_bucket_top_k(queries, keys, valid, BUCKETS, 8)


def test_queries_must_be_finite():
    queries, keys, valid = make_inputs()
    queries[2, 5, 4, 3] = torch.nan
    with pytest.raises(ValueError, match="queries must be finite"):
        strided_bucket_top_k(queries, keys, valid, BUCKETS)
