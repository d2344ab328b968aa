"""The search by 8-bit codes equals the full product, whatever the keys are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byheart.ops import code_scan, key_codes, reference_search, search_codes
from byheart.ops.key_codes import BLOCK, encode_blocks, new_codes
from byheart.ops.search import top_k_inner_product
from byheart.ops.search_codes import codes_top_k
from byheart.ops.search_select import EXCLUDED

BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM, TOP_K = 3, 10, 5, 2, 1013, 11, 7
USED = torch.tensor([ENTRIES, 911, 5])


@pytest.fixture(
    autouse=True,
    params=[key_codes.INTEGER_PRODUCT, key_codes.BFLOAT16_PRODUCT],
    ids=["integers", "bfloat16"],
)
def product(request, monkeypatch):
    """Search with a product that is right here, whether or not it is fast."""
    if not key_codes.is_right(request.param):
        pytest.skip("this product is not right here")
    monkeypatch.setattr(search_codes, "code_product", lambda: request.param)
    return request.param


class TableBias:
    """A bias that is known for every slot."""

    def __init__(self, table):
        self.table = table

    def at(self, row_ids, slots):
        return self.table[row_ids, slots]

    def of_blocks(self, block_size):
        pad = (0, -self.table.shape[1] % block_size)
        low, high = (
            torch.nn.functional.pad(self.table, pad, value=value).unflatten(1, (-1, block_size))
            for value in (torch.inf, -torch.inf)
        )
        return low.amin(2), high.amax(2)

    def dense(self):
        return self.table


def encoded(keys, used=USED, centers=None):
    if centers is None:
        centers = keys.float().mean(2).nan_to_num(0.0, 0.0, 0.0)
    codes = new_codes(keys, centers)
    for row, num_used in enumerate(used.tolist()):
        encode_blocks(codes, keys, row, range(-(-num_used // BLOCK)))
    return codes


def assert_exact(queries, keys, found, used=USED, bias=None):
    """Equal the float32 search; of tied entries it may be any, each once."""
    valid = torch.arange(keys.shape[2]) < used[:, None]
    expected = top_k_inner_product(
        queries, keys, valid, found.scores.shape[3], bias=bias, scan_dtype=torch.float32
    )
    present = expected.scores[expected.valid].abs()
    # float32 sums of the same products in another order, where products may cancel
    tolerance = 4e-6 * float(present.amax()) if present.numel() else 0
    assert torch.equal(found.valid, expected.valid)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=tolerance)
    assert not found.slots[~found.valid].any()
    assert (found.scores[~found.valid] == EXCLUDED).all()
    repeated = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    index = found.slots.flatten(2)[..., None].expand(-1, -1, -1, keys.shape[3])
    chosen = repeated.gather(2, index).view(*found.slots.shape, keys.shape[3])
    scores = (chosen * queries.unsqueeze(3)).sum(-1)
    if bias is not None:
        scores = scores + bias[torch.arange(len(keys))[:, None, None, None], found.slots]
    torch.testing.assert_close(
        scores[found.valid], found.scores[found.valid], rtol=1e-5, atol=tolerance
    )
    each_once = torch.where(found.valid, found.slots, -1 - torch.arange(found.slots.shape[3]))
    assert (each_once.sort(dim=3).values.diff(dim=3) > 0).all()


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def keys_of_kind(kind, entries=ENTRIES):
    """Keys as text makes them, and worse."""
    shape = (BATCH, KV_HEADS, entries, HEAD_DIM)
    drawn = unit(torch.randn(97, HEAD_DIM))[torch.randint(97, shape[:3])]
    keys = {
        "normal": lambda: torch.randn(shape),
        "unit": lambda: unit(torch.randn(shape)),
        "duplicates": lambda: drawn,
        "clusters": lambda: unit(drawn + 0.02 * torch.randn(shape)),
        "all equal": lambda: torch.ones(shape),
        "zeros": lambda: torch.zeros(shape),
        "one direction": lambda: unit(torch.randn(shape) - 7 * unit(torch.randn(HEAD_DIM))),
        "far away": lambda: 1000 + torch.randn(shape),
        "outliers": lambda: torch.randn(shape) * torch.randn(shape[:3]).exp().unsqueeze(3) ** 3,
        "one large dimension": lambda: torch.randn(shape) * (100.0 ** -torch.arange(HEAD_DIM)),
        # squares of these underflow, or overflow
        "tiny": lambda: torch.randn(shape) * 1e-25,
        "huge": lambda: torch.randn(shape) * 1e25,
    }[kind]()
    if kind == "duplicates":
        # the best entry fills half of the memory, so that most of it ties
        keys[:, :, 1::2] = keys[:, :, :1]
    return keys


KINDS = [
    "normal", "unit", "duplicates", "clusters", "all equal", "zeros", "one direction", "far away",
    "outliers", "one large dimension", "tiny", "huge",
]  # fmt: skip

BIASES = {
    "none": lambda: None,
    "ages": lambda: -0.5 * torch.arange(ENTRIES, 0, -1.0).log().expand(BATCH, -1),
    "steep": lambda: -50 * torch.arange(ENTRIES, 0, -1.0).log().expand(BATCH, -1),
    "random": lambda: 3 * torch.randn(BATCH, ENTRIES),
    "large": lambda: 1e6 + torch.randn(BATCH, ENTRIES),
}


@pytest.mark.parametrize("bias_kind", BIASES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_full_product(kind, bias_kind, monkeypatch):
    # several slabs, so that some are skipped
    monkeypatch.setattr(code_scan, "SLAB", 2)
    keys, bias = keys_of_kind(kind), BIASES[bias_kind]()
    queries = unit(torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM))
    table = None if bias is None else TableBias(bias)
    found = codes_top_k(queries, keys, encoded(keys), USED, TOP_K, table)
    assert_exact(queries, keys, found, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_slow_twin(dtype):
    keys = torch.randn(BATCH, KV_HEADS, 2 * BLOCK + 3, HEAD_DIM).to(dtype)
    queries, used = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM), torch.tensor([131, 70, 0])
    bias = torch.randn(BATCH, keys.shape[2])
    valid = torch.arange(keys.shape[2]) < used[:, None]
    found = codes_top_k(queries, keys, encoded(keys, used), used, TOP_K, TableBias(bias))
    slow = reference_search.top_k_inner_product(queries, keys, valid, TOP_K, bias)
    torch.testing.assert_close(found.scores, slow.scores)
    assert torch.equal(found.slots, slow.slots)
    assert torch.equal(found.valid, slow.valid)


@given(
    seed=st.integers(0, 2**32 - 1),
    entries=st.integers(1, 5 * BLOCK),
    head_dim=st.integers(2, 70),
    top_k=st.integers(1, 40),
    log_size=st.integers(-12, 12),
    slab=st.integers(1, 3),
    survivors=st.sampled_from([1, 8]),
)
def test_any_sizes_equal_the_full_product(
    seed, entries, head_dim, top_k, log_size, slab, survivors
):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, entries, head_dim, generator=generator) * 10.0**log_size
    queries = torch.randn(1, 4, 1, head_dim, generator=generator)
    used = torch.randint(entries + 1, (1,), generator=generator)
    bias = torch.randn(1, entries, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_scan, "SLAB", slab)
        patch.setattr(search_codes, "_MAX_SURVIVORS", survivors)
        patch.setattr(search_codes, "_SCORE_BYTES", 4 * BLOCK * 7)
        found = codes_top_k(
            queries, keys, encoded(keys, used), used, min(top_k, entries), TableBias(bias)
        )
    assert_exact(queries, keys, found, used, bias)


@pytest.mark.parametrize("center", [0.0, -3.0, 1e4, 3e38, torch.nan])
def test_any_center_gives_the_same_result(center):
    keys = keys_of_kind("unit")
    queries = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM)
    codes = encoded(keys, centers=torch.full((BATCH, KV_HEADS, HEAD_DIM), center))
    assert_exact(queries, keys, codes_top_k(queries, keys, codes, USED, TOP_K))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_unused_slots_hold_does_not_matter(value):
    keys = keys_of_kind("unit")
    clean = codes_top_k(
        queries := torch.randn(BATCH, HEADS, 1, HEAD_DIM), keys, encoded(keys), USED, TOP_K
    )
    for row, used in enumerate(USED.tolist()):
        keys[row, :, used:] = value
    found = codes_top_k(queries, keys, encoded(keys), USED, TOP_K)
    for one, other in zip(found, clean, strict=True):
        torch.testing.assert_close(one, other)


def test_stale_entries_behind_the_used_ones_raise_no_cut():
    # one block: entries that are not in use score far more than those that are
    keys = unit(torch.randn(1, 1, BLOCK, HEAD_DIM))
    query = unit(torch.randn(1, 1, 1, HEAD_DIM))
    keys[:, :, 40:] = query * 50
    used = torch.tensor([40])
    found = codes_top_k(query, keys, encoded(keys, used), used, 3)
    assert_exact(query, keys, found, used)


def test_old_slabs_are_not_read_where_age_has_put_them_below_the_cut(monkeypatch):
    monkeypatch.setattr(code_scan, "SLAB", 2)
    keys = unit(torch.randn(1, 1, 20 * BLOCK, HEAD_DIM))
    used, bias = torch.tensor([20 * BLOCK]), -3 * torch.arange(20 * BLOCK, 0, -1.0).log()[None]
    codes = encoded(keys, used)
    # a score of these could not be missed
    codes.codes[:, :, :10] = 127
    query = unit(torch.randn(1, 1, 1, HEAD_DIM))
    found = codes_top_k(query, keys, codes, used, 3, TableBias(bias))
    assert_exact(query, keys, found, used, bias)
    read, _ = spy_on_products(monkeypatch)
    codes_top_k(query, keys, codes, used, 3, TableBias(bias))
    assert sum(read) == 4 * BLOCK


def spy_on_products(monkeypatch):
    """Count the codes that queries read, and list how many heads and queries share a product."""
    read, products = [], []
    multiply, product = code_scan.multiply_codes, search_codes.product_top_k

    def spy(queries, keys, out):
        read.append(len(queries) * len(keys))
        return multiply(queries, keys, out)

    def spy_on_product(queries, *arguments):
        products.append(tuple(queries.shape[:2]))
        return product(queries, *arguments)

    monkeypatch.setattr(code_scan, "multiply_codes", spy)
    monkeypatch.setattr(search_codes, "product_top_k", spy_on_product)
    return read, products


@pytest.mark.parametrize("biased", [False, True])
def test_codes_that_discard_too_little_are_given_up_after_the_first_slabs(biased, monkeypatch):
    monkeypatch.setattr(code_scan, "SLAB", 2)
    entries = 40 * BLOCK
    keys = unit(torch.randn(BATCH, KV_HEADS, entries, HEAD_DIM))
    # every fourth entry is nearly the same, and asked for
    near = keys[:, :, :1] + 1e-4 * torch.randn(BATCH, KV_HEADS, entries // 4, HEAD_DIM)
    keys[:, :, ::4] = unit(near)
    queries = keys[:, :, :1].repeat_interleave(HEADS // KV_HEADS, dim=1)
    used, bias = torch.full((BATCH,), entries), None
    if biased:
        bias = -1e-6 * torch.arange(entries, 0, -1.0).log().expand(BATCH, -1)
    table, codes = None if bias is None else TableBias(bias), encoded(keys, used)
    read, products = spy_on_products(monkeypatch)
    found = codes_top_k(queries, keys, codes, used, 3, table)
    assert sum(read) == BATCH * HEADS * 4 * BLOCK
    # all heads of a row at once, each with the queries that share it
    assert products == [(KV_HEADS, HEADS // KV_HEADS)] * BATCH
    assert_exact(queries, keys, found, used, bias)


def test_a_head_that_codes_do_not_help_costs_the_others_nothing(monkeypatch):
    monkeypatch.setattr(code_scan, "SLAB", 2)
    entries, row, head = 40 * BLOCK, 1, 3
    keys = unit(torch.randn(BATCH, KV_HEADS, entries, HEAD_DIM))
    keys[row, head, 1:] = unit(keys[row, head, :1] + 1e-4 * keys[row, head, 1:])
    queries = unit(torch.randn(BATCH, HEADS, 1, HEAD_DIM))
    used, codes = torch.full((BATCH,), entries), None
    # encoded around a center that is far away, so that codes cannot tell its keys apart
    centers = keys.mean(2)
    centers[row, head] += 5
    codes = encoded(keys, used, centers)
    read, products = spy_on_products(monkeypatch)
    assert_exact(queries, keys, codes_top_k(queries, keys, codes, used, 3), used)
    assert products == [(1, HEADS // KV_HEADS)]
    assert sum(read) == entries * HEADS * BATCH - 2 * 36 * BLOCK


def test_ordinary_keys_need_no_product(monkeypatch):
    monkeypatch.setattr(code_scan, "SLAB", 16)
    entries = 64 * BLOCK
    keys, used = unit(torch.randn(BATCH, KV_HEADS, entries, 31)), torch.full((BATCH,), entries)
    _, products = spy_on_products(monkeypatch)
    codes_top_k(unit(torch.randn(BATCH, HEADS, 1, 31)), keys, encoded(keys, used), used, 3)
    assert not products


def test_no_queries_find_nothing():
    keys = keys_of_kind("unit")
    found = codes_top_k(torch.randn(BATCH, HEADS, 0, HEAD_DIM), keys, encoded(keys), USED, TOP_K)
    assert found.scores.shape == found.slots.shape == found.valid.shape == (BATCH, HEADS, 0, TOP_K)


def test_scores_that_the_product_rounds_alike_are_told_apart(monkeypatch):
    monkeypatch.setattr(search_codes, "_MAX_SURVIVORS", 10**6)
    # codes and queries are exact; what is left is the rounding of their products, by up to 512,
    # which keeps their order within a block, and not where each block has a scale of its own
    entries, head_dim, top_k = 20 * BLOCK, 16, 7
    keys = 100.0 + torch.randint(-3, 4, (1, 4, entries, head_dim))
    keys[..., 0] = 127
    keys *= 1 + 0.01 * torch.rand(20).repeat_interleave(BLOCK)[:, None]
    queries = torch.full((1, 4, 1, head_dim), 127.0)
    queries[..., 0] = 0
    used = torch.tensor([entries])
    codes = encoded(keys, used, torch.zeros(1, 4, head_dim))
    assert_exact(queries, keys, codes_top_k(queries, keys, codes, used, top_k), used)


def test_queries_of_a_head_may_need_different_slabs(monkeypatch):
    monkeypatch.setattr(code_scan, "SLAB", 2)
    # however many entries may be left
    monkeypatch.setattr(search_codes, "_MAX_SURVIVORS", 10**6)
    entries, head_dim = 12 * BLOCK, 16
    keys = unit(torch.randn(1, 1, entries, head_dim))
    # the first slabs that are read hold these: they settle the search, or help nothing
    keys[:, :, : 4 * BLOCK] *= 0.01
    keys[:, :, : 4 * BLOCK, 0] = 50
    queries = unit(torch.randn(1, 1, 5, head_dim))
    queries[..., 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    used, read = torch.tensor([entries]), spy_on_products(monkeypatch)[0]
    codes = encoded(keys, used, torch.zeros(1, 1, head_dim))
    found = codes_top_k(queries, keys, codes, used, 3)
    assert_exact(queries, keys, found, used)
    assert sum(read) == 5 * 4 * BLOCK + 3 * 8 * BLOCK
