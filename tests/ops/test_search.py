from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byheart.ops import reference_search, search_cpu, search_float32, search_head
from byheart.ops.search import Neighbours, check_shapes, check_top_k, recall, top_k_inner_product
from byheart.ops.search_cpu import scan_top_k
from byheart.ops.search_float32 import float32_top_k
from byheart.ops.search_groups import num_buckets, plan_scan
from byheart.ops.search_select import (
    EXCLUDED,
    GROUP,
    Buffers,
    buffers_on,
    largest,
    sort_packed,
    unpack,
)

BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM, TOP_K = 3, 10, 5, 7, 23, 11, 13


# bytes of scores for which the searches of this file are large
FEW_BYTES = 2**20


@pytest.fixture(params=["default", "float32", "cut", "bfloat16"])
def scan_dtype(request, monkeypatch):
    """The way a large search goes: chosen for its size, or one of those it may choose."""
    if request.param == "cut":
        monkeypatch.setattr(search_head, "_CUT_MIN_ENTRIES", 0)
        monkeypatch.setattr(search_head, "_CUT_MIN_QUERIES", 0)
    kinds = {"default": None, "bfloat16": torch.bfloat16}
    return kinds.get(request.param, torch.float32)


def assert_scores_close(found, expected):
    """Equal up to float32 sums of the same products in another order, where products may cancel."""
    present = expected[expected > EXCLUDED].abs()
    tolerance = 2e-6 * float(present.amax()) if present.numel() else 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


def make_inputs(entries=ENTRIES, queries=QUERIES, dtype=torch.float32):
    asked = torch.randn(BATCH, HEADS, queries, HEAD_DIM)
    keys = torch.randn(BATCH, KV_HEADS, entries, HEAD_DIM).to(dtype)
    return asked, keys, torch.ones(BATCH, entries, dtype=torch.bool)


def full_product(queries, keys, valid, top_k, bias=None):
    """Search as anyone would who had the memory for all scores."""
    repeated = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries @ repeated.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias[:, None, None]
    scores = scores.masked_fill(~valid[:, None, None], EXCLUDED)
    scores, slots = scores.topk(top_k)
    return Neighbours(scores, slots, scores > EXCLUDED)


def assert_same(found, expected, queries, keys, bias=None):
    """Equal scores, and slots that have these scores, each once: ties may be any of the tied."""
    assert_scores_close(found.scores, expected.scores)
    assert torch.equal(found.valid, expected.valid)
    assert not found.slots[~found.valid].any()
    heads, head_dim = queries.shape[1], keys.shape[3]
    repeated = keys.float().repeat_interleave(heads // keys.shape[1], dim=1)
    chosen = repeated.gather(2, found.slots.flatten(2)[..., None].expand(-1, -1, -1, head_dim))
    scores = (chosen.view(*found.slots.shape, head_dim) * queries.unsqueeze(3)).sum(-1)
    if bias is not None:
        bias = bias[:, None, None].expand(*found.slots.shape[:3], -1)
        scores = scores + bias.gather(3, found.slots)
    assert_scores_close(scores[found.valid], found.scores[found.valid])
    each_once = torch.where(found.valid, found.slots, -1 - torch.arange(found.slots.shape[3]))
    each_once = each_once.sort(dim=3).values
    assert (each_once.diff(dim=3) > 0).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_slow_twin(dtype, biased):
    queries, keys, valid = make_inputs(dtype=dtype)
    bias = 3 * torch.randn(BATCH, ENTRIES) if biased else None
    valid[1] = torch.rand(ENTRIES) < 0.7
    valid[2, TOP_K - 2 :] = False
    found = top_k_inner_product(queries, keys, valid, TOP_K, bias=bias)
    slow = reference_search.top_k_inner_product(queries, keys, valid, TOP_K, bias)
    assert_scores_close(found.scores, slow.scores)
    assert torch.equal(found.valid, slow.valid)
    assert torch.equal(found.slots, slow.slots)


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def keys_of_kind(kind, entries):
    """Keys as text makes them, and worse."""
    shape = (BATCH, KV_HEADS, entries, HEAD_DIM)
    prototypes = unit(torch.randn(97, HEAD_DIM))
    drawn = prototypes[torch.randint(97, shape[:3])]
    if kind == "duplicates":
        return drawn
    if kind == "clusters":
        return unit(drawn + 0.02 * torch.randn(shape))
    if kind == "sorted clusters":
        noisy = unit(drawn + 0.02 * torch.randn(shape))
        order = (noisy @ prototypes[0]).argsort(dim=-1)
        return noisy.gather(2, order[..., None].expand_as(noisy))
    if kind == "one hot cluster":
        keys = unit(torch.randn(shape))
        keys[:, :, : entries // 2] = keys[:, :, :1] + 0.001 * torch.randn(HEAD_DIM)
        return keys
    if kind == "all equal":
        return torch.ones(shape)
    if kind == "one direction":
        return unit(torch.randn(shape) - 7 * prototypes[0])
    if kind == "tiny":
        # squares of these underflow
        return torch.randn(shape) * 1e-25
    if kind == "outliers":
        return torch.randn(shape) * torch.randn(shape[:3]).exp().unsqueeze(3) ** 3
    assert kind == "normal"
    return torch.randn(shape)


KINDS = [
    "normal",
    "duplicates",
    "clusters",
    "sorted clusters",
    "one hot cluster",
    "all equal",
    "one direction",
    "outliers",
    "tiny",
]


@pytest.mark.parametrize("kind", KINDS)
def test_large_searches_equal_the_full_product(kind, scan_dtype):
    keys, top_k = keys_of_kind(kind, 1013), 3
    queries = unit(torch.randn(BATCH, HEADS, 131, HEAD_DIM))
    valid = torch.ones(BATCH, 1013, dtype=torch.bool)
    valid[1, 911:] = False
    valid[2] = torch.rand(1013) < 0.5
    found = top_k_inner_product(
        queries, keys, valid, top_k, max_bytes=FEW_BYTES, scan_dtype=scan_dtype
    )
    assert_same(found, full_product(queries, keys, valid, top_k), queries, keys)


BIASES = {
    "ages": lambda entries: -0.5 * torch.randperm(entries).add(1.0).log(),
    "large": lambda entries: 1e4 * torch.randn(entries),
    "far from zero": lambda entries: torch.randn(entries) - 1e4,
    "one outlier": lambda entries: torch.eye(entries)[7] * 100,
    "tiny": lambda entries: torch.randn(entries) * 1e-25,
    "zero": torch.zeros,
}


@pytest.mark.parametrize("kind", ["normal", "clusters", "one hot cluster", "all equal", "tiny"])
@pytest.mark.parametrize("bias_kind", BIASES)
def test_large_searches_with_a_bias_equal_the_full_product(bias_kind, kind, scan_dtype):
    keys, top_k = keys_of_kind(kind, 1013)[:, :2], 3
    queries = unit(torch.randn(BATCH, 4, 131, HEAD_DIM)) * 5
    valid = torch.ones(BATCH, 1013, dtype=torch.bool)
    valid[1, 911:] = False
    valid[2] = torch.rand(1013) < 0.5
    bias = torch.stack([BIASES[bias_kind](1013) for _ in range(BATCH)])
    expected = full_product(queries, keys, valid, top_k, bias)
    poisoned = bias.masked_fill(~valid, torch.nan)
    found = top_k_inner_product(
        queries,
        keys,
        valid,
        top_k,
        bias=poisoned,
        max_bytes=FEW_BYTES,
        scan_dtype=scan_dtype,
    )
    assert_same(found, expected, queries, keys, bias)


def test_several_levels_of_groups_equal_the_full_product(scan_dtype):
    queries, keys = torch.randn(1, 1, 67, HEAD_DIM), torch.randn(1, 1, 20011, HEAD_DIM)
    valid = torch.ones(1, 20011, dtype=torch.bool)
    # one block of queries, blocks of 13 and one of 2, and one query at a time, in slabs
    for max_bytes, asked in (
        (4 * 67 * 20480, queries),
        (4 * 13 * 20480, queries),
        (1, queries[:, :, :3]),
    ):
        found = top_k_inner_product(
            asked, keys, valid, TOP_K, max_bytes=max_bytes, scan_dtype=scan_dtype
        )
        assert_same(found, full_product(asked, keys, valid, TOP_K), asked, keys)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_above_the_cut_equal_the_full_product(kind):
    # 3 * 8 buckets of 8 * 5 entries and more
    for entries, top_k in ((1013, 3), (195, 3), (20011, 13)):
        keys = keys_of_kind(kind, entries)[0, 0]
        queries, bias = unit(torch.randn(67, HEAD_DIM)), torch.randn(entries)
        for dtype in (torch.float32, torch.bfloat16):
            scores = queries @ keys.to(dtype).float().t() + bias
            found, slots = float32_top_k(
                queries, keys.to(dtype), bias, top_k, 4 * 13 * entries, Buffers(keys.device)
            )
            assert_scores_close(found, scores.topk(top_k).values)
            assert_scores_close(scores.gather(1, slots), found)
            assert (slots.sort(dim=1).values.diff(dim=1) > 0).all()


def test_a_score_that_is_not_a_number_makes_no_cut():
    keys, queries = torch.randn(1013, HEAD_DIM), torch.randn(5, HEAD_DIM)
    keys[7] = torch.nan
    buffers = Buffers(keys.device)
    found, slots = float32_top_k(queries, keys, None, 3, 2**20, buffers)
    expected, columns = largest(queries @ keys.t(), 3, buffers)
    assert_scores_close(found, expected)
    assert torch.equal(slots, columns)


def test_padding_is_never_found_among_scores_that_overflow():
    # one query of 64, so that the block is not crowded, has fewer than top_k finite scores
    keys, queries = torch.randn(8195, 2), torch.rand(64, 2) + 0.1
    keys[10:, 0] = -3e38
    queries[:, 0] = torch.eye(64)[0] * 2
    found, slots = float32_top_k(queries, keys, None, 32, 2**25, Buffers(keys.device))
    assert (slots < 8195).all()
    assert (slots[0].sort().values.diff() > 0).all()
    assert torch.equal(found, (queries @ keys.t()).topk(32).values)


@pytest.mark.parametrize("top_k", [1, 2, 32])
@pytest.mark.parametrize("entries", [8 * 256, 2100, 8195, 65_536, 65_600, 100_000, 2**20])
def test_scans_are_hardly_wider_than_their_entries(entries, top_k):
    plan = plan_scan(entries, top_k, 8)
    assert entries <= plan.width <= 1.07 * entries
    assert plan.repeats * plan.buckets <= entries
    assert plan.buckets >= num_buckets(top_k)


def test_only_queries_with_many_equal_scores_are_searched_by_themselves(monkeypatch):
    keys = torch.randn(1013, HEAD_DIM)
    keys[::2], searched = keys[0], []
    queries = torch.randn(67, HEAD_DIM)
    queries[:5] = 20 * keys[0]
    queries[5:] -= (queries[5:] @ keys[0])[:, None] * keys[0] / keys[0].square().sum()

    def counted(scores, *arguments):
        searched.append(len(scores))
        return largest(scores, *arguments)

    monkeypatch.setattr(search_float32, "largest", counted)
    found, _ = float32_top_k(queries, keys, None, 3, 2**20, Buffers(keys.device))
    assert_scores_close(found, (queries @ keys.t()).topk(3).values)
    assert searched == [5]


@given(
    entries=st.integers(1, 700),
    queries=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    max_bytes=st.sampled_from([1, 997, 2**13, 2**23]),
    scan_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    data=st.data(),
)
def test_any_sizes_and_any_block_size_equal_the_full_product(
    entries, queries, kv_heads, repeats, max_bytes, scan_dtype, biased, data
):
    top_k = data.draw(st.integers(1, min(entries, 40)))
    used = data.draw(st.integers(0, entries))
    asked = torch.randn(2, kv_heads * repeats, queries, HEAD_DIM)
    keys = torch.randn(2, kv_heads, entries, HEAD_DIM)
    valid = torch.arange(entries) < torch.tensor([[used], [entries]])
    bias = torch.randn(2, entries) if biased else None
    found = top_k_inner_product(
        asked, keys, valid, top_k, bias=bias, max_bytes=max_bytes, scan_dtype=scan_dtype
    )
    assert_same(found, full_product(asked, keys, valid, top_k, bias), asked, keys, bias)


@pytest.mark.parametrize("kind", ["everywhere", "in one slab", "duplicates", "biased"])
def test_many_keys_are_searched_a_slab_at_a_time(monkeypatch, kind):
    entries, slabs = 3001, []
    queries, keys, valid = make_inputs(entries)
    valid[1, 2000:] = False
    bias = None
    if kind == "in one slab":
        keys[:, :, 1700:1800] *= 5
    elif kind == "duplicates":
        keys = keys[:, :, :8].repeat(1, 1, entries // 8 + 1, 1)[:, :, :entries]
    elif kind == "biased":
        bias = torch.linspace(-3, 3, entries).expand(BATCH, -1)
    scan = search_head.scan_top_k

    def counted(queries_QD, keys_ND, *arguments):
        slabs.append(len(keys_ND))
        return scan(queries_QD, keys_ND, *arguments)

    monkeypatch.setattr(search_head, "scan_top_k", counted)
    found = top_k_inner_product(
        queries, keys, valid, TOP_K, bias=bias, max_bytes=1, scan_dtype=torch.bfloat16
    )
    assert_same(found, full_product(queries, keys, valid, TOP_K, bias), queries, keys, bias)
    assert (found.scores.diff(dim=-1) <= 0).all()
    assert len(slabs) > 2 * BATCH * KV_HEADS
    assert min(slabs) >= GROUP * num_buckets(TOP_K)


def test_every_slab_holds_enough_entries():
    # in slabs of 129 the last of these would be alone, and two are asked for
    entries, top_k = 129 * 130 + 1, 2
    queries, keys, valid = (side[:1] for side in make_inputs(entries))
    queries, keys = queries[:, :2], keys[:, :1]
    keys[:, :, -1] *= 100
    found = top_k_inner_product(queries, keys, valid, top_k, max_bytes=1, scan_dtype=torch.bfloat16)
    assert_same(found, full_product(queries, keys, valid, top_k), queries, keys)
    assert (found.slots.diff(dim=-1) != 0).all()


@pytest.mark.parametrize("max_bytes", [None, 2**12])
def test_keys_of_invalid_slots_are_never_looked_at(max_bytes):
    queries, keys, valid = make_inputs(entries=401)
    valid[0] = torch.rand(401) < 0.5
    valid[1] = False
    valid[2, 83:] = False
    poisoned = keys.masked_fill(~valid[:, None, :, None], torch.nan)
    found = top_k_inner_product(queries, poisoned, valid, 3, max_bytes=max_bytes)
    assert_same(found, full_product(queries, keys, valid, 3), queries, keys)
    assert not found.valid[1].any()


@pytest.mark.parametrize("scan_dtype", [torch.float32, torch.bfloat16])
def test_a_later_search_does_not_touch_an_earlier_result(scan_dtype):
    queries, keys, valid = make_inputs(entries=1009)
    found = top_k_inner_product(queries, keys, valid, 3, scan_dtype=scan_dtype)
    before = [x.clone() for x in found]
    top_k_inner_product(-queries, keys, valid, 3, scan_dtype=scan_dtype)
    assert all(map(torch.equal, found, before))


def test_buffers_are_lent_to_one_search_at_a_time():
    device = torch.device("cpu")
    with buffers_on(device) as outer, buffers_on(device) as inner:
        assert outer is not inner
    with buffers_on(device) as again:
        assert again is outer
        again.take("large", (2**27,), torch.int8)
    with buffers_on(device) as fresh:
        assert fresh is not outer


def test_rows_do_not_see_each_other():
    queries, keys, valid = make_inputs(entries=1009, queries=137)
    valid[1, 503:] = False
    together = top_k_inner_product(queries, keys, valid, 3)
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone = top_k_inner_product(queries[one], keys[one], valid[one], 3)
        assert_same(alone, Neighbours(*(x[one] for x in together)), queries[one], keys[one])


def test_shuffled_slots_hold_the_same_neighbours():
    queries, keys, valid = make_inputs(entries=601)
    order = torch.randperm(601)
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    shuffled = top_k_inner_product(queries, keys[:, :, order], valid, TOP_K)
    assert_scores_close(shuffled.scores, found.scores)
    assert torch.equal(order[shuffled.slots], found.slots)


def test_grouped_queries_equal_repeated_keys():
    queries, keys, valid = make_inputs()
    repeated = keys.repeat_interleave(HEADS // KV_HEADS, dim=1)
    grouped = top_k_inner_product(queries, keys, valid, TOP_K)
    assert_same(grouped, top_k_inner_product(queries, repeated, valid, TOP_K), queries, keys)


def test_autocast_does_not_round_scores():
    queries, keys, valid = make_inputs(entries=701, queries=131)
    expected = top_k_inner_product(queries, keys, valid, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = top_k_inner_product(queries, keys, valid, 3)
    assert all(map(torch.equal, found, expected))


def test_search_is_an_operator_that_compilers_need_not_trace():
    queries, keys, valid = make_inputs(entries=701)
    operator = torch.ops.byheart.top_k_inner_product.default
    checks = ("test_schema", "test_faketensor")
    for bias in (None, torch.randn(BATCH, 701)):
        arguments = (queries, keys, valid, bias, 3, 997, None)
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_bias_that_is_not_finite_is_refused():
    queries, keys, valid = make_inputs()
    bias = torch.full((BATCH, ENTRIES), -torch.inf)
    with pytest.raises(ValueError, match="bias must be finite where valid, got NaN or infinity"):
        top_k_inner_product(queries, keys, valid, TOP_K, bias=bias)


def test_result_carries_no_gradient():
    queries, keys, valid = make_inputs()
    found = top_k_inner_product(queries.requires_grad_(), keys.requires_grad_(), valid, TOP_K)
    assert not found.scores.requires_grad


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1, 1e-25])
@pytest.mark.parametrize("cut_errors", [-0.5, 0, 0.5, 1.5])
def test_proof_holds_wherever_the_cut_lies(cut_errors, scale, biased, monkeypatch):
    monkeypatch.setattr(search_cpu, "_CUT_ERRORS", cut_errors)
    # on a sphere of 3 dimensions scores lie closer together than bfloat16 can tell
    queries, keys = unit(torch.randn(1013, 3)), unit(torch.randn(1009, 3)) * scale
    bias = torch.randn(1009) * 0.05 * scale if biased else torch.zeros(1009)
    scores, _, proven = scan_top_k(
        queries, keys, 2, 2**20, Buffers(queries.device), bias if biased else None
    )
    expected = (queries @ keys.t() + bias).topk(2).values
    right = (scores - expected).abs().amax(1) <= 1e-6 * scale
    assert right[proven].all()
    if cut_errors < 1:
        # neighbours were lost, or the test would prove nothing
        assert not right.all()


def test_scan_proves_ordinary_queries_and_gives_up_on_hopeless_ones():
    queries = unit(torch.randn(131, HEAD_DIM))
    buffers = Buffers(queries.device)
    proven = scan_top_k(queries, unit(torch.randn(1013, HEAD_DIM)), 3, 2**16, buffers)[2]
    assert proven.float().mean() > 0.95
    ages = torch.randperm(1013).add(1.0)
    for slope in (0.1, 1):
        keys, bias = unit(torch.randn(1013, HEAD_DIM)), -slope * ages.log()
        proven = scan_top_k(10 * queries, keys, 3, 2**16, buffers, bias)[2]
        assert proven.float().mean() > 0.8
    assert not scan_top_k(queries, torch.ones(1013, HEAD_DIM), 3, 2**16, buffers)[2].any()
    infinite = torch.full((1013, HEAD_DIM), torch.inf)
    assert not scan_top_k(queries, infinite, 3, 2**16, buffers)[2].any()


def test_packed_words_order_as_numbers_and_return_exact_bits():
    scores = torch.tensor([[-2.0, 3.5, -0.0, 1e-40, EXCLUDED, 2.0**100, -1e-40]])
    slots = torch.tensor([2**32 - 1, 5, 7, 11, 13, 17, 0])
    words = sort_packed(scores, slots, 7, Buffers(scores.device), in_order=True)
    found, where = unpack(words)
    assert found[0].tolist() == sorted(scores[0].tolist(), reverse=True)
    assert where.tolist() == [[17, 5, 11, 7, 0, 2**32 - 1, 13]]


@pytest.mark.parametrize("top_k", [1, 29])
@pytest.mark.parametrize("columns", [29, 257, 1009, 5003])
def test_largest_equals_topk(columns, top_k):
    scores = torch.randn(31, columns)
    found, where = largest(scores, top_k, Buffers(scores.device))
    assert torch.equal(found, scores.topk(top_k).values)
    assert torch.equal(scores.gather(1, where), found)


def test_smallest_scan_is_accepted():
    entries = GROUP * num_buckets(2)
    queries, keys = torch.randn(1, 1, 3, 5), torch.randn(1, 1, entries, 5)
    valid = torch.ones(1, entries, dtype=torch.bool)
    found = top_k_inner_product(queries, keys, valid, 2, scan_dtype=torch.bfloat16)
    assert_same(found, full_product(queries, keys, valid, 2), queries, keys)


def test_recall_counts_exact_neighbours_found():
    queries, keys, valid = make_inputs()
    valid[2, TOP_K - 4 :] = False
    exact = top_k_inner_product(queries, keys, valid, TOP_K)
    found = top_k_inner_product(queries + torch.randn_like(queries), keys, valid, TOP_K - 2)
    torch.testing.assert_close(recall(found, exact), reference_search.recall(found, exact))
    assert recall(exact, exact) == 1
    nothing = Neighbours(exact.scores, exact.slots, torch.zeros_like(exact.valid))
    assert recall(nothing, exact) == 0
    assert recall(found, nothing) == 1


@pytest.mark.parametrize("top_k", [0, ENTRIES + 1])
def test_top_k_must_fit_the_memory(top_k):
    queries, keys, valid = make_inputs()
    with pytest.raises(ValueError, match=rf"top_k must .* slots \(23\), got {top_k}\. Lower top_k"):
        top_k_inner_product(queries, keys, valid, top_k)


def test_top_k_message_names_what_the_caller_calls_it():
    with pytest.raises(ValueError, match=r"size must be between 1 and the number of hats \(3\)"):
        check_top_k(5, 3, name="size", of="hats", remedy="buy hats")


def test_shapes_must_fit():
    queries, keys, valid = make_inputs()
    # top_k_inner_product itself is not called: its annotations, checked here, refuse first
    with pytest.raises(ValueError, match=r"must have the axes .* got shapes \(10, 7, 11\)"):
        check_shapes(queries[0], keys, valid)
    with pytest.raises(ValueError, match=r"batch size \(3\) and head_dim \(11\) .*, got 3 and 9"):
        check_shapes(queries, keys[..., :9], valid)
    with pytest.raises(ValueError, match=r"multiple of the key-value heads \(4\), got 10"):
        check_shapes(queries, keys[:, :4], valid)
    with pytest.raises(ValueError, match=r"\(batch, entry\) = \(3, 23\), got \(3, 22\)"):
        check_shapes(queries, keys, valid[:, 1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_queries_must_be_finite(value):
    queries, keys, valid = make_inputs()
    queries[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="queries must be finite"):
        top_k_inner_product(queries, keys, valid, TOP_K)


def test_scan_dtype_must_be_known():
    with pytest.raises(ValueError, match=r"scan_dtype must be .*, got torch\.int8"):
        top_k_inner_product(*make_inputs(), TOP_K, scan_dtype=torch.int8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    queries, keys, valid = make_inputs(entries=20011, queries=131)
    valid[1, 911:] = False
    valid[2] = torch.rand(20011) < 0.5
    expected = top_k_inner_product(queries, keys, valid, TOP_K)
    for max_bytes in (None, 2**16):
        found = top_k_inner_product(
            queries.cuda(), keys.cuda(), valid.cuda(), TOP_K, max_bytes=max_bytes
        )
        assert_same(Neighbours(*(x.cpu() for x in found)), expected, queries, keys)


def test_buffers_made_in_inference_mode_serve_outside_of_it():
    queries, keys = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 1021, 7)
    valid = torch.ones(2, 1021, dtype=torch.bool)
    # buffers are kept per thread: a fresh one has none yet
    with ThreadPoolExecutor(1) as thread:

        def search():
            return top_k_inner_product(queries, keys, valid, 5)

        def search_for_inference():
            with torch.inference_mode():
                return search()

        inference = thread.submit(search_for_inference).result()
        assert torch.equal(inference.scores, thread.submit(search).result().scores)
