"""The kernels of the search: compiled where there is a GPU, else in Triton's interpreter."""

import itertools

import pytest
import torch
from interpreted import interpret_fast

from byheart.ops import reference_search, search_plan, search_triton
from byheart.ops.search import top_k_inner_product
from byheart.ops.search_plan import Plan, default_plan, plan_search
from byheart.ops.search_select import EXCLUDED
from byheart.ops.search_triton import select_largest
from byheart.ops.triton_door import import_kernels

CUDA = torch.cuda.is_available()
# the interpreter of 3.6 fails with NumPy 2.4
pytest.importorskip("triton", minversion="3.6" if CUDA else "3.7")
search_kernels = import_kernels("search_kernels")
if not CUDA:
    interpret_fast()

DEVICE = torch.device("cuda" if CUDA else "cpu")
# NumPy, which interprets, warns of NaN and infinity where a GPU computes on
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if CUDA:
    pytestmark.append(pytest.mark.gpu)

# few queries: the interpreter takes milliseconds for each
BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM, TOP_K = 2, 6, 3, 1, 163, 19, 7


@pytest.fixture
def searched(monkeypatch):
    """Let kernels search whatever the device and the size; lists the plans they searched by."""
    plans, search = [], search_triton.search

    def spy(*arguments):
        plans.append(arguments[-1])
        return search(*arguments)

    monkeypatch.setattr(search_triton, "search", spy)
    monkeypatch.setattr(search_plan, "uses_kernels", lambda *_: True)
    monkeypatch.setattr(search_plan, "choose_plan", lambda *_: Plan(8, 8))
    # programs with several tiles, of which the last has fewer
    monkeypatch.setattr(search_triton, "_ENOUGH_PROGRAMS", 9)
    yield plans
    assert plans


def make_inputs(dtype=torch.float32, entries=ENTRIES, queries=QUERIES, head_dim=HEAD_DIM):
    asked = torch.randn(BATCH, HEADS, queries, head_dim, device=DEVICE)
    keys = torch.randn(BATCH, KV_HEADS, entries, head_dim, device=DEVICE).to(dtype)
    valid = torch.ones(BATCH, entries, dtype=torch.bool, device=DEVICE)
    valid[1] = torch.rand(entries, device=DEVICE) < 0.7
    return asked, keys, valid


def all_scores(queries, keys, valid, bias=None):
    repeated = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.double() @ repeated.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias[:, None, None]
    return scores.masked_fill(~valid[:, None, None], EXCLUDED)


def assert_exact(found, scores, scale=None):
    """The largest scores, each with a slot that has it, no slot twice; ties may be any of the tied.

    What may differ is the rounding of float32 sums, whose terms are at most as large as `scale`.
    """
    top_k = found.scores.shape[3]
    expected = scores.topk(top_k).values
    valid = expected > EXCLUDED
    assert torch.equal(found.valid, valid)
    assert found.scores.dtype == torch.float32
    assert found.slots.dtype == torch.int64
    assert (found.slots[~valid] == 0).all()
    assert (found.scores[~valid] == EXCLUDED).all()
    if scale is None:
        scale = float(expected[valid].abs().amax()) if valid.any() else 0.0
    tolerance = {"rtol": 1e-5, "atol": 2e-6 * scale}
    torch.testing.assert_close(found.scores[valid].double(), expected[valid], **tolerance)
    own = scores.gather(3, found.slots)[valid]
    torch.testing.assert_close(found.scores[valid].double(), own, **tolerance)
    assert (found.scores.diff(dim=3) <= 0).all()
    unused = -1 - torch.arange(top_k, device=DEVICE)
    slots = torch.where(valid, found.slots, unused).sort(dim=3).values
    assert (slots.diff(dim=3) > 0).all()


def crossed(first, second):
    """All pairs on a GPU; else each of the first with one of the second, as each takes a second."""
    return [*itertools.product(first, second)] if CUDA else [*zip(first, itertools.cycle(second))]


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "biased"),
    crossed([torch.float32, torch.bfloat16, torch.float16, *EIGHT_BITS], [True, False]),
)
def test_equals_the_slow_twin(searched, dtype, biased):
    queries, keys, valid = make_inputs(dtype, queries=2)
    bias = 3 * torch.randn(BATCH, ENTRIES, device=DEVICE) if biased else None
    valid[1, TOP_K - 2 :] = False
    found = top_k_inner_product(queries, keys, valid, TOP_K, bias=bias)
    on_cpu = [x if x is None else x.cpu() for x in (queries, keys, valid, bias)]
    slow = reference_search.top_k_inner_product(*on_cpu[:3], TOP_K, on_cpu[3])
    torch.testing.assert_close(found.scores.cpu(), slow.scores, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.valid.cpu(), slow.valid)
    assert_exact(found, all_scores(queries, keys, valid, bias))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
def test_any_width_of_a_head(searched, head_dim):
    queries, keys, valid = make_inputs(torch.bfloat16, entries=67, head_dim=head_dim)
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert_exact(found, all_scores(queries, keys, valid))


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def keys_of_kind(kind):
    shape = (BATCH, KV_HEADS, ENTRIES, HEAD_DIM)
    keys = torch.randn(shape)
    if kind == "duplicates":
        return keys[:, :, torch.randint(11, (ENTRIES,))]
    if kind == "clusters":
        return unit(keys[:, :, torch.randint(11, (ENTRIES,))] + 0.001 * torch.randn(shape))
    if kind == "one hot group":
        # entries 3, 11, 19, ... of the second tile are a group of the plan above
        keys[:, :, 67:128:8] = 7 * keys[:, :, :1] + 0.01 * torch.randn(BATCH, KV_HEADS, 8, HEAD_DIM)
        return keys
    if kind == "all equal":
        return torch.ones(shape)
    if kind == "tiny":
        return keys * 1e-25
    if kind == "huge":
        return keys * 1e15
    assert kind == "outliers"
    return keys * torch.randn(shape[:3]).exp().unsqueeze(3) ** 3


KINDS = ["duplicates", "all equal", "one hot group", "clusters", "tiny", "outliers", "huge"]


@pytest.mark.parametrize(("kind", "dtype"), crossed(KINDS, [torch.bfloat16, torch.float32]))
def test_hard_keys(searched, kind, dtype):
    queries, _, valid = make_inputs()
    keys = keys_of_kind(kind).to(DEVICE, dtype)
    if kind != "tiny":
        # a query that finds itself; of tiny numbers even the square of the length is zero
        queries[0, :, 0] = keys[0, :, 0].float().repeat_interleave(HEADS // KV_HEADS, dim=0)
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert_exact(found, all_scores(queries, keys, valid))


def test_one_hot_group_is_found_whole(searched):
    queries, _, valid = make_inputs()
    valid[:] = True
    keys = keys_of_kind("one hot group").to(DEVICE)
    queries[:] = keys[:, :, :1].repeat_interleave(HEADS // KV_HEADS, dim=1)
    found = top_k_inner_product(queries, keys, valid, 8)
    assert torch.equal(
        found.slots.sort(dim=3).values,
        torch.arange(67, 128, 8, device=DEVICE).expand_as(found.slots),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_bits_of_a_query_decide(searched, dtype):
    # of three parts of 8 bits, the first is 1, the second 2**-9, and the third tells one entry from
    # all others
    usual, best = 1 + 2.0**-9, 1 + 2.0**-9 + 2.0**-21
    queries = torch.zeros(BATCH, HEADS, QUERIES, HEAD_DIM, device=DEVICE)
    keys = torch.zeros(BATCH, KV_HEADS, ENTRIES, HEAD_DIM, device=DEVICE, dtype=dtype)
    queries[..., 0], queries[..., 1] = usual, best
    keys[..., 0] = 1.0
    keys[:, :, 151, :2] = torch.tensor([0.0, 1.0])
    valid = torch.ones(BATCH, ENTRIES, dtype=torch.bool, device=DEVICE)
    found = top_k_inner_product(queries, keys, valid, 1)
    assert (found.slots == 151).all()
    assert (found.scores == best).all()


@pytest.mark.parametrize("entries", [1, 13, 64, 67, 128])
def test_every_entry_can_be_asked_for(searched, entries):
    queries, keys, valid = make_inputs(torch.bfloat16, entries)
    found = top_k_inner_product(queries, keys, valid, entries)
    assert_exact(found, all_scores(queries, keys, valid))


def test_rows_with_few_or_no_entries(searched):
    queries, keys, valid = make_inputs()
    valid[0] = False
    valid[1] = torch.arange(ENTRIES, device=DEVICE) % 53 == 5
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert not found.valid[0].any()
    assert found.valid[1].sum(-1).eq(3).all()
    assert_exact(found, all_scores(queries, keys, valid))


@pytest.mark.parametrize(
    ("junk", "dtype"),
    crossed([torch.nan, torch.inf, -torch.inf], [torch.bfloat16, torch.float32]),
)
def test_what_invalid_slots_hold_is_never_looked_at(searched, junk, dtype):
    queries, keys, valid = make_inputs(dtype)
    valid[0, 97:] = False
    bias = torch.randn(BATCH, ENTRIES, device=DEVICE)
    clean = top_k_inner_product(queries, keys, valid, TOP_K, bias=bias)
    poisoned = keys.masked_fill(~valid[:, None, :, None], junk)
    found = top_k_inner_product(
        queries, poisoned, valid, TOP_K, bias=bias.masked_fill(~valid, junk)
    )
    assert all(map(torch.equal, found, clean))


@pytest.mark.parametrize("plan", [Plan(8, 16), Plan(16, 8), Plan(32, 8)])
def test_any_groups(searched, plan, monkeypatch):
    monkeypatch.setattr(search_plan, "choose_plan", lambda *_: plan)
    queries, keys, valid = make_inputs(torch.bfloat16, entries=301)
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert searched == [plan]
    assert_exact(found, all_scores(queries, keys, valid))


def test_groups_of_groups(searched, monkeypatch):
    monkeypatch.setattr(search_triton, "_SELECTED_WIDTH", 32)
    selected, select = [], search_triton._select

    def spy(*arguments, **options):
        selected.append(options)
        return select(*arguments, **options)

    monkeypatch.setattr(search_triton, "_select", spy)
    # 96 groups
    queries, keys, valid = make_inputs(torch.bfloat16, entries=743)
    found = top_k_inner_product(queries, keys, valid, 2)
    assert any(selected)
    assert_exact(found, all_scores(queries, keys, valid))


@pytest.mark.parametrize("plan", [Plan(8, 8), Plan(8, 16), Plan(16, 8), Plan(32, 8)])
@pytest.mark.parametrize("entries", [300, 2**17 + 1, 2**22 + 1, 9 * 2**20 + 1, 2**26 + 1])
def test_groups_of_a_memory_of_any_size_can_be_grouped_evenly(entries, plan):
    tiles = search_triton._num_tiles(entries, plan)
    assert entries <= tiles * plan.tile < 1.1 * entries + plan.tile
    width = tiles * plan.groups_per_tile
    while width > search_triton._SELECTED_WIDTH and width % search_triton._COARSE_GROUP == 0:
        width //= search_triton._COARSE_GROUP
    # few warps select from what is left
    assert width <= 2 * search_triton._SELECTED_WIDTH


# 24 groups: one query, 3 of the 4 of a key-value head, those of two heads share the memory
@pytest.mark.parametrize(("queries", "max_bytes"), [(1, 1), (2, 3 * 96), (2, 8 * 96)])
def test_pieces_of_any_size(searched, queries, max_bytes):
    queries, keys, valid = make_inputs(torch.bfloat16, queries=queries)
    bias = torch.randn(BATCH, ENTRIES, device=DEVICE)
    found = top_k_inner_product(queries, keys, valid, TOP_K, bias=bias, max_bytes=max_bytes)
    assert_exact(found, all_scores(queries, keys, valid, bias))


def test_smaller_blocks_are_tried_where_one_does_not_fit(searched, monkeypatch):
    tried, scan = [], search_triton._scan

    def small_device(*arguments):
        tried.append(arguments[-1])
        if len(tried) < 3:
            raise search_kernels.OutOfResources(2, 1, "shared memory")
        return scan(*arguments)

    monkeypatch.setattr(search_triton, "_scan", small_device)
    queries, keys, valid = make_inputs(entries=67, queries=17)
    inputs = queries[:1, :4], keys[:1, :2], valid[:1]
    found = top_k_inner_product(*inputs, TOP_K)
    assert [launch[0::2] for launch in tried] == [(64, 3), (64, 2), (32, 3)]
    assert_exact(found, all_scores(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries_are_taken_as_they_are(searched, dtype):
    queries, keys, valid = make_inputs(torch.bfloat16)
    queries = queries.to(dtype)
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert_exact(found, all_scores(queries, keys, valid))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_scores_are_float32_whatever_precision_the_search_may_use(searched, precision):
    queries, keys, valid = make_inputs(torch.bfloat16)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = top_k_inner_product(queries, keys, valid, 1)
    finally:
        torch.set_float32_matmul_precision(before)
    scores = all_scores(queries, keys, valid)
    own = scores.gather(3, found.slots)
    torch.testing.assert_close(found.scores.double(), own, rtol=1e-5, atol=1e-5)
    assert (own > scores.amax(3, keepdim=True) - 0.1).all()


def test_memories_that_are_views_are_read_where_they_are(searched):
    queries, keys, valid = make_inputs(torch.bfloat16)
    wide = torch.randn(BATCH, ENTRIES + 5, KV_HEADS, HEAD_DIM + 3, device=DEVICE).bfloat16()
    wide[:, 2:-3, :, 1:-2] = keys.transpose(1, 2)
    view = wide.transpose(1, 2)[:, :, 2:-3, 1:-2]
    asked = queries.transpose(1, 2).contiguous().transpose(1, 2)
    found = top_k_inner_product(asked, view, valid.t().contiguous().t(), TOP_K)
    assert_exact(found, all_scores(queries, keys, valid))


def test_not_finite_queries_return_slots_of_the_memory(searched, monkeypatch):
    monkeypatch.setattr("byheart.ops.search.check_finite", lambda _: None)
    queries, keys, valid = make_inputs()
    queries[0, 0], queries[1, 1, 0, 3] = torch.nan, torch.inf
    found = top_k_inner_product(queries, keys, valid, TOP_K)
    assert ((found.slots >= 0) & (found.slots < ENTRIES)).all()
    untouched = slice(2, None)
    scores = all_scores(queries[:, untouched], keys[:, 1:], valid)
    assert_exact(type(found)(*(x[:, untouched] for x in found)), scores)


def test_search_stays_an_operator_that_compilers_need_not_trace(searched):
    operator = torch.ops.byheart.top_k_inner_product.default
    arguments = (*make_inputs(entries=67), None, TOP_K, 1 << 20, None)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("width", "top_k"), [(37, 37), (128, 1), (128, 5), (259, 37)])
def test_selection_equals_topk(width, top_k):
    values = torch.randn(11, width, device=DEVICE)
    values[1] = 3.0
    values[2] = torch.randint(3, (width,), device=DEVICE).float()
    values[3, ::2] = EXCLUDED
    values[4] = EXCLUDED
    values[5] *= 1e-40
    values[6] = torch.where(values[6] > 0, 0.0, -0.0)
    columns = select_largest(values, top_k)
    picked = values.gather(1, columns.long()).sort(descending=True).values
    assert torch.equal(picked, values.topk(top_k).values)
    assert (columns.diff(dim=1) > 0).all()


# with groups, and with groups of groups where 1024 columns are many for one of them
@pytest.mark.parametrize(("width", "top_k"), [(64, 1), (528, 3), (1024, 1), (1024, 3)])
def test_selection_from_groups_of_values_equals_topk(width, top_k, monkeypatch):
    monkeypatch.setattr(search_triton, "_SELECTED_WIDTH", 32)
    values = torch.randn(9, width, device=DEVICE)
    values[1] = 3.0
    values[2] = EXCLUDED
    values[3] = float("-inf")
    values[4, 7::31] = float("inf")
    values[5] = torch.where(values[5] > 0, 0.0, -0.0)
    columns = select_largest(values, top_k).long()
    picked = values.gather(1, columns).sort(descending=True).values
    assert torch.equal(picked, values.topk(top_k).values)
    assert all(len(set(row)) == top_k for row in columns.tolist())


@pytest.mark.parametrize(("width", "top_k"), [(1032, 5), (2040, 64), (4096, 128)])
def test_wide_rows_that_are_selected_from_at_once(width, top_k):
    values = torch.randn(3, width, device=DEVICE)
    values[1] = torch.randint(5, (width,), device=DEVICE).float()
    columns = select_largest(values, top_k).long()
    picked = values.gather(1, columns).sort(descending=True).values
    assert torch.equal(picked, values.topk(top_k).values)
    assert all(len(set(row)) == top_k for row in columns.tolist())


@pytest.mark.parametrize("count", [1, 3, 255])
@pytest.mark.parametrize("is_negative", [False, True])
def test_a_selection_ranks_nan_by_its_sign(is_negative, count, monkeypatch):
    monkeypatch.setattr(search_triton, "_SELECTED_WIDTH", 32)
    values = torch.randn(2, 256, device=DEVICE)
    nan = torch.tensor(-1 if is_negative else 0x7FFFFFFF, dtype=torch.int32)
    values[0, 1 : 1 + count] = nan.view(torch.float32).to(DEVICE)
    columns = select_largest(values, 2)[0].tolist()
    assert len(set(columns)) == 2
    assert all(0 <= column < 256 for column in columns)
    found = sum(1 <= column <= count for column in columns)
    assert found == (max(0, 2 - (256 - count)) if is_negative else min(2, count))


def test_groups_are_larger_in_larger_memories():
    groups = [default_plan(entries, 32, 128).group for entries in (2048, 2**16, 2**20)]
    assert groups == [8, 16, 32]
    # all members of the chosen groups would be half of the memory
    assert default_plan(512, 32, 128) is None


def test_sizes_that_kernels_do_not_know_are_left_to_products(monkeypatch):
    queries, keys, _ = make_inputs(entries=4099)
    assert CUDA or plan_search(queries, keys, 3) is None
    monkeypatch.setattr(search_plan, "uses_kernels", lambda *_: True)
    assert plan_search(queries, keys, 3) == default_plan(4099, 3, 4 * HEAD_DIM)
    assert plan_search(queries, keys, 257) is None
    assert plan_search(queries[:, :, :0], keys, 3) is None
    wide = [x.repeat(1, 1, 1, 17) for x in (queries, keys)]
    assert plan_search(*wide, 3) is None


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["random", "clusters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_realistic_sizes_on_a_gpu(dtype, kind):
    generator = torch.Generator("cuda").manual_seed(0)
    keys = unit(torch.randn(2, 4, 65_521, 64, device="cuda", generator=generator))
    if kind == "clusters":
        keys = unit(keys[:, :, torch.arange(65_521, device="cuda") % 1009] + 0.02 * keys)
    queries = unit(torch.randn(2, 8, 251, 64, device="cuda", generator=generator))
    keys, valid = keys.to(dtype), torch.rand(2, 65_521, device="cuda", generator=generator) < 0.9
    valid[0] = True
    bias = -0.1 * torch.randperm(65_521, device="cuda").add(1.0).log().expand(2, -1)
    assert plan_search(queries, keys, 32) is not None
    for side in (None, bias):
        found = top_k_inner_product(queries, keys, valid, 32, bias=side)
        assert_exact(found, all_scores(queries, keys, valid, side))
