"""Codes are used only where they are multiplied exactly, and never say more than they know."""

import pytest
import torch

from byheart.ops.key_codes import (
    BFLOAT16_PRODUCT,
    BLOCK,
    INTEGER_PRODUCT,
    code_product,
    encode_blocks,
    is_right,
    multiply_codes,
    new_codes,
)

CAPABLE, LESS_CAPABLE = {"avx512_vnni": True, "avx2": True}, {"avx2": True}


@pytest.fixture(autouse=True)
def _asks_again():
    code_product.cache_clear()
    yield
    code_product.cache_clear()


def exact(left, right, out):
    return out.copy_((left.int().unsqueeze(2) * right.int().unsqueeze(0)).sum(1))


def saturated(left, right, out):
    """Add pairs of products in 16 bits first, as processors without the instruction do."""
    # they multiply numbers without a sign by numbers with one, and correct for it afterwards
    products = (left.int() + 128).unsqueeze(2) * right.int().unsqueeze(0)
    sums = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1)
    return out.copy_(sums - 128 * right.int().sum(0))


def rounded(queries, keys, scales):
    return (queries.float() @ keys.float().t() * scales.float()).bfloat16()


def rounded_too_often(queries, keys, scales):
    halves = [
        rounded(queries[:, half], keys[:, half], scales) for half in (slice(8), slice(8, None))
    ]
    return 1.01 * sum(halves)


def refused(*_, **__):
    msg = "no such product"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("capabilities", "integers", "bfloat16", "expected"),
    [
        (CAPABLE, exact, rounded, INTEGER_PRODUCT),
        ({"amx_int8": True}, exact, rounded, INTEGER_PRODUCT),
        (LESS_CAPABLE, exact, rounded, BFLOAT16_PRODUCT),
        ({}, exact, rounded, None),
        (CAPABLE, saturated, rounded, BFLOAT16_PRODUCT),
        (CAPABLE, refused, rounded, BFLOAT16_PRODUCT),
        (CAPABLE, None, rounded, BFLOAT16_PRODUCT),
        (LESS_CAPABLE, exact, rounded_too_often, None),
        (LESS_CAPABLE, exact, refused, None),
        (CAPABLE, None, None, None),
    ],
)
def test_codes_need_a_processor_and_an_operator(
    capabilities, integers, bfloat16, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for name, operator in (("_int_mm", integers), ("_weight_int8pack_mm", bfloat16)):
        if operator is None:
            monkeypatch.delattr(torch, name, raising=False)
        else:
            monkeypatch.setattr(torch, name, operator, raising=False)
    assert code_product() is expected


def test_a_torch_that_does_not_tell_has_no_codes(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert code_product() is None


@pytest.mark.parametrize("product", [INTEGER_PRODUCT, BFLOAT16_PRODUCT])
@pytest.mark.parametrize("width", [16, 64, 144])
def test_products_of_codes_are_as_exact_as_they_claim(product, width):
    if not is_right(product):
        pytest.skip("this product is not right here")
    queries = torch.randint(-127, 128, (product.most_queries, width)).to(product.query_dtype)
    keys = torch.randint(-127, 128, (5 * BLOCK + 3, width)).to(torch.int8)
    found = torch.empty(len(queries), len(keys), dtype=product.score_dtype)
    multiply_codes(queries, keys, found)
    expected = queries.double() @ keys.double().t()
    assert ((found - expected).abs() <= product.rounding * expected.abs()).all()


@pytest.mark.parametrize("head_dim", [1, 16, 17])
def test_codes_end_in_zeros(head_dim):
    keys = torch.randn(1, 1, BLOCK, head_dim)
    codes = new_codes(keys, keys.mean(2))
    encode_blocks(codes, keys, 0, range(1))
    assert codes.codes.shape[4] % 16 == 0
    assert not codes.codes[..., head_dim:].any()
    assert codes.codes[..., :head_dim].any(dim=3).all()


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_hold_in_exact_arithmetic(size, dtype):
    keys = (size * (torch.randn(2, 3, 3 * BLOCK - 7, 11) + 2)).to(dtype)
    codes = new_codes(keys, keys.float().mean(2))
    for row in range(2):
        encode_blocks(codes, keys, row, range(3))
    shifted = keys.double() - codes.centers.double()[:, :, None]
    shifted = torch.cat([shifted, shifted[:, :, -1:].expand(-1, -1, 7, -1)], dim=2)
    shifted = shifted.unflatten(2, (3, BLOCK))
    meant = codes.codes[..., :11].double() * codes.scales.double()[..., None, None]
    # float32 sums of 11 squares
    rounding = 1 + 16 * 2.0**-24
    errors, norms = codes.errors.double() * rounding, codes.norms.double() * rounding
    # differences of a coordinate that is rounded to 24 bits
    slack = norms * 11 * 2.0**-24
    assert ((shifted - meant).norm(dim=-1).amax(3) <= errors + slack).all()
    assert (shifted.norm(dim=-1).amax(3) <= norms).all()
    # about half a unit of 127 in every coordinate: codes that say nothing would pass all the above
    assert (errors <= norms * 0.02 + 1e-15).all()
