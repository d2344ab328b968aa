"""Keys as 8-bit integers, with bounds on what that leaves out.

The code of a key is its rounded difference from a center that all keys of a head share, in units of
a scale that a block of slots shares. A block also keeps the largest length of its keys, of those
differences, and of what rounding left.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

# slots that share a scale and bounds: with 32 the work per block shows, with 128 more entries stay
BLOCK = 64

LARGEST_CODE = 127

# blocks that are encoded at a time, of all heads: half a MiB of float32 for 8 heads of 64
_CHUNK_BLOCKS = 4

# squares of numbers below this underflow
UNDERFLOW = 2.0**-63


@cache
def multiplies_codes() -> bool:
    """Say whether this processor multiplies codes fast and exactly.

    Without the instruction a library may add pairs of products in 16 bits, where they saturate. It
    may be told not to use an instruction that is there, and the operator is not part of PyTorch's
    public interface: so a product whose result is known has the last word.

    Returns:
        Whether it does.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_vnni") or capabilities.get("amx_int8")):
        return False
    try:
        return all(_is_exact(head_dim) for head_dim in (2, 16, 40, 64, 67, 128))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _is_exact(head_dim: int) -> bool:
    """Multiply as a search does, the largest codes and others.

    Returns:
        Whether the products are right.
    """
    with torch.inference_mode(mode=False):
        keys_ND = torch.arange(5 * BLOCK * head_dim).mul_(37).remainder_(255).sub_(LARGEST_CODE)
        keys_ND = keys_ND.to(torch.int8).view(-1, head_dim)
        keys_ND[::2] = LARGEST_CODE
        keys_ND[::3] = -LARGEST_CODE
        for query_1D in (keys_ND[1:2], keys_ND[2:3], keys_ND[3:4]):
            multiplied = multiply_codes(query_1D, keys_ND, torch.empty(1, len(keys_ND)).int())
            if not torch.equal(multiplied, (keys_ND.int() * query_1D.int()).sum(1).int()[None]):
                return False
    return True


def multiply_codes(
    query_1D: Int8[Tensor, "1 head_dim"],
    keys_ND: Int8[Tensor, "entry head_dim"],
    out: Int32[Tensor, "1 entry"],
) -> Int32[Tensor, "1 entry"]:
    """Multiply the code of a query with those of keys.

    Args:
        query_1D: The query.
        keys_ND: Keys of at least two numbers: torch 2.13 multiplies one column wrongly.
        out: Takes the inner products.

    Returns:
        `out`.
    """
    product: Tensor = torch._int_mm(query_1D, keys_ND.t(), out=out)
    return product


class KeyCodes(NamedTuple):
    """Codes of all keys in a ring, and the bounds of each block of slots."""

    codes: Int8[Tensor, "batch kv_heads block slot head_dim"]
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
    codes = torch.zeros(*shape, BLOCK, head_dim, dtype=torch.int8)
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
    codes.codes[place] = rounded
    codes.scales[place] = torch.where(finite_GT, scales_GT, 0.0)
    codes.lengths[place] = torch.where(finite_GT, _longest(keys_GTSD), math.inf)
    codes.norms[place] = torch.where(finite_GT, _longest(units) * scales_GT, 0.0)
    errors_GT = _longest(rounded.sub_(units)) * scales_GT
    codes.errors[place] = torch.where(finite_GT, errors_GT, math.inf)


def _longest(vectors_GTSD: Tensor) -> Float[Tensor, "kv_heads block"]:
    # twice as fast as a vector norm of the last axis
    longest_GT = vectors_GTSD.square().sum(3).amax(2).sqrt()
    return longest_GT + UNDERFLOW * math.sqrt(vectors_GTSD.shape[3])
