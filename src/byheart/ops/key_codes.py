"""Keys as 8-bit integers, with bounds on what that leaves out.

The code of a key is its rounded difference from a center that all keys of a head share, in units of
a scale that a block of slots shares. A block also keeps the largest length of its keys, of those
differences, and of what rounding left.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Num
from torch import Tensor

# slots that share a scale and bounds: with 32 the work per block shows, with 128 more entries stay
BLOCK = 64

LARGEST_CODE = 127

# Codes have zeros up to a multiple of so many numbers: PyTorch's kernel for bfloat16 and 8-bit
# numbers reads 16 of each at a time, aligned, whether or not there are as many
_WIDTH_MULTIPLE = 16

# blocks that are encoded at a time, of all heads: half a MiB of float32 for 8 heads of 64
_CHUNK_BLOCKS = 4

# squares of numbers below this underflow
UNDERFLOW = 2.0**-63


class CodeProduct(NamedTuple):
    """How this machine multiplies the code of a query with those of keys."""

    query_dtype: torch.dtype
    """int8: the query is a code as well; bfloat16: a code that is not rounded to whole numbers."""
    score_dtype: torch.dtype
    """int32 or float32."""
    rounding: float
    """What a score may be off by, in units of itself, beside what float32 sums leave out."""
    most_queries: int
    """Queries for which it reads keys faster together than one after the other."""


# for 8 queries at once the integer product takes some 30 times as long as for one
INTEGER_PRODUCT = CodeProduct(torch.int8, torch.int32, 0.0, most_queries=1)
# it is made for blocks of 4; they take twice as long as one
BFLOAT16_PRODUCT = CodeProduct(torch.bfloat16, torch.float32, 2.0**-8, most_queries=4)


@cache
def code_product() -> CodeProduct | None:
    """Choose how codes are multiplied.

    Where a processor lacks the instruction for 8-bit products, the operator for them adds one
    number at a time. The one that multiplies bfloat16 numbers with 8-bit weights is vectorised on
    x86. Neither is part of PyTorch's public interface, and a library may be told not to use an
    instruction that is there: so products whose results are known have the last word.

    Returns:
        The faster of those that are right; `None` if there is none, and on processors for which it
        has not been measured.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_vnni") or capabilities.get("amx_int8"):
        candidates = [INTEGER_PRODUCT, BFLOAT16_PRODUCT]
    elif capabilities.get("avx2"):
        candidates = [BFLOAT16_PRODUCT]
    else:
        candidates = []
    return next(filter(is_right, candidates), None)


def is_right(product: CodeProduct) -> bool:
    """Multiply as a search does, the largest codes and others.

    Args:
        product: How.

    Returns:
        Whether the products are what they claim to be.
    """
    with torch.inference_mode(mode=False):
        for width in (16, 48, 64, 80, 128):
            keys_NW = torch.arange(5 * BLOCK * width).mul_(37).remainder_(255).sub_(LARGEST_CODE)
            keys_NW = keys_NW.to(torch.int8).view(-1, width)
            keys_NW[::2] = LARGEST_CODE
            keys_NW[::3] = -LARGEST_CODE
            for codes_QW in (keys_NW[1:2], keys_NW[2:3], keys_NW[3 : 3 + product.most_queries]):
                exact_QN = (keys_NW.int() * codes_QW.int().unsqueeze(1)).sum(2)
                out_QN = torch.empty(exact_QN.shape, dtype=product.score_dtype)
                try:
                    multiply_codes(codes_QW.to(product.query_dtype), keys_NW, out_QN)
                except (AttributeError, NotImplementedError, RuntimeError, TypeError):
                    return False
                if ((out_QN.double() - exact_QN).abs() > product.rounding * exact_QN.abs()).any():
                    return False
    return True


def multiply_codes(
    queries_QW: Num[Tensor, "query width"],
    keys_NW: Int8[Tensor, "entry width"],
    out: Num[Tensor, "query entry"],
) -> Num[Tensor, "query entry"]:
    """Multiply the codes of queries with those of keys.

    Args:
        queries_QW: Up to `most_queries` of them, in the type of a `CodeProduct`.
        keys_NW: Keys, both padded as `KeyCodes` are and contiguous.
        out: Takes the inner products, in the type of that product; contiguous for integers.

    Returns:
        `out`.
    """
    if queries_QW.dtype is torch.int8:
        product: Tensor = torch._int_mm(queries_QW, keys_NW.t(), out=out)
        return product
    ones_N = torch.ones(len(keys_NW), dtype=queries_QW.dtype)
    return out.copy_(torch._weight_int8pack_mm(queries_QW, keys_NW, ones_N))


class KeyCodes(NamedTuple):
    """Codes of all keys in a ring, and the bounds of each block of slots."""

    codes: Int8[Tensor, "batch kv_heads block slot width"]
    """With zeros behind the numbers of a key."""
    scales: Float[Tensor, "batch kv_heads block"]
    lengths: Float[Tensor, "batch kv_heads block"]
    """Largest length of a key; infinite for a block with numbers that are not finite, as are its
    errors."""
    norms: Float[Tensor, "batch kv_heads block"]
    """Largest length of a key less the center."""
    errors: Float[Tensor, "batch kv_heads block"]
    """Largest length of the difference to what the code stands for."""
    centers: Float[Tensor, "batch kv_heads head_dim"]


def new_codes(
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    centers: Float[Tensor, "batch kv_heads head_dim"],
) -> KeyCodes:
    """Allocate codes for all slots of a memory, without encoding any.

    Args:
        keys: All slots.
        centers: What is taken from the keys of a head first. Any vectors will do; the mean of the
            keys makes the bounds tight.

    Returns:
        Codes for `encode_blocks` to fill.
    """
    batch, kv_heads, num_slots, head_dim = keys.shape
    shape = (batch, kv_heads, -(-num_slots // BLOCK))
    width = -(-head_dim // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    codes = torch.zeros(*shape, BLOCK, width, dtype=torch.int8)
    scales, lengths, norms, errors = torch.zeros(4, *shape)
    return KeyCodes(codes, scales, lengths, norms, errors, centers.float())


def encode_blocks(
    codes: KeyCodes,
    keys: Float[Tensor, "batch kv_heads entry head_dim"],
    row: int,
    blocks: range,
) -> None:
    """Encode the keys in consecutive blocks of slots of one row, in place.

    Args:
        codes: What is changed.
        keys: All slots; whatever the slots of these blocks hold is encoded, in use or not.
        row: The row.
        blocks: The blocks.
    """
    num_slots = keys.shape[2]
    for start in range(blocks.start, blocks.stop, _CHUNK_BLOCKS):
        stop = min(start + _CHUNK_BLOCKS, blocks.stop)
        part_GND = keys[row, :, start * BLOCK : stop * BLOCK].float()
        missing = stop * BLOCK - num_slots
        if missing > 0:
            # repeating the last slot changes no bound
            last = part_GND[:, -1:].expand(-1, missing, -1)
            part_GND = torch.cat([part_GND, last], dim=1)
        part_GTSD = part_GND.reshape(keys.shape[1], stop - start, BLOCK, keys.shape[3])
        _encode(codes, part_GTSD, (row, slice(None), slice(start, stop)))


def _encode(codes: KeyCodes, keys_GTSD: Tensor, place: tuple[int, slice, slice]) -> None:
    shifted = keys_GTSD - codes.centers[place[0], :, None, None]
    sizes_GT = shifted.abs().amax((2, 3))
    scales_GT = (sizes_GT / LARGEST_CODE).clamp_(min=UNDERFLOW)
    units = shifted.div_(scales_GT[..., None, None])
    # what is not finite has a code, too; the infinite error says that it means nothing
    finite_GT = torch.isfinite(scales_GT)
    rounded = units.round() if finite_GT.all() else torch.zeros_like(units)
    codes.codes[place][..., : keys_GTSD.shape[3]] = rounded
    codes.scales[place] = torch.where(finite_GT, scales_GT, 0.0)
    codes.lengths[place] = torch.where(finite_GT, _longest(keys_GTSD), math.inf)
    codes.norms[place] = torch.where(finite_GT, _longest(units) * scales_GT, 0.0)
    errors_GT = _longest(rounded.sub_(units)) * scales_GT
    codes.errors[place] = torch.where(finite_GT, errors_GT, math.inf)


def _longest(vectors_GTSD: Tensor) -> Float[Tensor, "kv_heads block"]:
    # twice as fast as a vector norm of the last axis
    longest_GT = vectors_GTSD.square().sum(3).amax(2).sqrt()
    return longest_GT + UNDERFLOW * math.sqrt(vectors_GTSD.shape[3])
