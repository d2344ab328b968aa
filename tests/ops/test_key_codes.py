"""Codes are used only where they are multiplied exactly, and never say more than they know."""

import pytest
import torch

from byheart.ops.key_codes import BLOCK, encode_blocks, multiplies_codes, new_codes

CAPABLE = {"avx512_vnni": True}


@pytest.fixture(autouse=True)
def _asks_again():
    multiplies_codes.cache_clear()
    yield
    multiplies_codes.cache_clear()


def exact(left, right, out):
    return out.copy_((left.int().unsqueeze(2) * right.int().unsqueeze(0)).sum(1))


def saturated(left, right, out):
    """Add pairs of products in 16 bits first, as processors without the instruction do."""
    # they multiply numbers without a sign by numbers with one, and correct for it afterwards
    products = (left.int() + 128).unsqueeze(2) * right.int().unsqueeze(0)
    pairs = torch.nn.functional.pad(products, (0, 0, 0, len(right) % 2)).unflatten(1, (-1, 2))
    sums = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)
    return out.copy_(sums - 128 * right.int().sum(0))


def refused(left, right, out):
    msg = "no such product"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("capabilities", "product", "expected"),
    [
        (CAPABLE, exact, True),
        ({"amx_int8": True}, exact, True),
        ({"avx2": True}, exact, False),
        ({}, exact, False),
        (CAPABLE, saturated, False),
        (CAPABLE, refused, False),
        (CAPABLE, None, False),
    ],
)
def test_codes_need_a_processor_and_an_operator(capabilities, product, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if product is None:
        monkeypatch.delattr(torch, "_int_mm", raising=False)
    else:
        monkeypatch.setattr(torch, "_int_mm", product, raising=False)
    assert multiplies_codes() is expected


def test_a_torch_that_does_not_tell_has_no_codes(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_codes()


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
    meant = codes.codes.double() * codes.scales.double()[..., None, None]
    # float32 sums of 11 squares
    rounding = 1 + 16 * 2.0**-24
    errors, norms = codes.errors.double() * rounding, codes.norms.double() * rounding
    # differences of a coordinate that is rounded to 24 bits
    slack = norms * 11 * 2.0**-24
    assert ((shifted - meant).norm(dim=-1).amax(3) <= errors + slack).all()
    assert (shifted.norm(dim=-1).amax(3) <= norms).all()
    # about half a unit of 127 in every coordinate: codes that say nothing would pass all the above
    assert (errors <= norms * 0.02 + 1e-15).all()
