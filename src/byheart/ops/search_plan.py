"""How a search on a GPU is cut into pieces, and at what precision its first pass multiplies.

The first pass only has to find the groups that hold the best entries, but it must not miss one. So
it multiplies nearly as exactly as a float32 product. Keys in bfloat16 or of 8 bits are multiplied
in bfloat16 with sums in float32: every product of two such numbers is exact, and a float32 query is
the sum of 3 of them. Other keys are multiplied as float32 numbers, each split into two TF32
numbers, in 3 products, which leave out about `2**-21` of a product; float16 queries and keys as
they are. Beside that, float32 sums are rounded, as in any float32 product. Entries whose scores
differ by less may be taken for each other.

Fewer parts, with a bound on their error and a second search where the bound does not suffice, would
be cheaper for float32 queries, and one more kernel.

`torch.set_float32_matmul_precision` allows fewer products: "high" 2 bfloat16 numbers or TF32,
"medium" one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byheart.ops.triton_door import power_of_two, uses_kernels

# the members of all chosen groups of a query lie in the registers of one program, and all pairs of
# chosen scores are compared
_MAX_MEMBERS = 4096
_MAX_TOP_K = 128
_MAX_HEAD_DIM = 256

# what compilers have been seen to add to the operands in shared memory
_SHARED_SLACK = 8 << 10


class Plan(NamedTuple):
    """How entries are grouped."""

    group: int
    """Entries of a group, a power of two."""
    groups_per_tile: int
    """Groups of a tile, a power of two; a tile has at least 16 entries."""

    @property
    def tile(self) -> int:
        """Entries of a tile."""
        return self.group * self.groups_per_tile


def default_plan(num_entries: int, top_k: int, key_bytes: int) -> Plan | None:
    """Weigh the maxima of all groups against the members of the chosen ones.

    A query writes and reads `num_entries / group` maxima of 4 bytes, about 3 times, and reads
    `top_k * group` keys: both cost the same at the root below. Groups of 8 to 32 differ little, but
    tiles of 64 KB were 2.7 times slower than those of half the size on an H200
    (`benchmarks/results/kernels-plans.json`).

    Args:
        num_entries: Slots of the memory.
        top_k: Neighbours per query.
        key_bytes: Bytes of a key.

    Returns:
        The plan; `None` where groups discard too little, and the product followed by `topk` is
        better.
    """
    ideal = math.sqrt(12 * num_entries / (key_bytes * top_k))
    # wider keys fill the shared memory of a multiprocessor sooner
    tile, largest = (128, 5 if key_bytes <= 128 else 4) if key_bytes <= 256 else (64, 3)
    group = 2 ** min(largest, max(3, round(math.log2(ideal))))
    if num_entries < 4 * group * top_k or group * top_k > _MAX_MEMBERS:
        return None
    return Plan(group, max(8, tile // group))


# replace it to measure other groups, or to return `None` for sizes where the product is faster
choose_plan: Callable[[int, int, int], Plan | None] = default_plan


def plan_search(queries: Tensor, keys: Tensor, top_k: int) -> Plan | None:
    """Decide whether the kernels search, and how.

    Args:
        queries: Batch, heads, queries, head_dim.
        keys: Batch, key-value heads, entries, head_dim.
        top_k: Neighbours per query.

    Returns:
        The plan; `None` if the kernels do not work here, do not know these types or sizes, or are
        not the best choice for them.
    """
    if queries.numel() == 0 or not uses_kernels(queries, keys.dtype):
        return None
    if top_k > _MAX_TOP_K or keys.shape[3] > _MAX_HEAD_DIM:
        return None
    return choose_plan(keys.shape[2], top_k, keys.shape[3] * keys.element_size())


class Parts(NamedTuple):
    """How the first pass multiplies: `number` parts of a query in `dtype`, at `precision`."""

    number: int
    dtype: torch.dtype
    precision: str
    """Of a product of float32 numbers, in Triton's terms."""


def choose_parts(queries: torch.dtype, keys: torch.dtype) -> Parts:
    """Choose as few products as give float32 scores, or as PyTorch is told to do with.

    Args:
        queries: Their type.
        keys: Their type.

    Returns:
        Parts of the queries.
    """
    allowed = torch.get_float32_matmul_precision()
    if keys is torch.float32 or (keys is torch.float16 and queries is not torch.float16):
        return Parts(1, torch.float32, "tf32x3" if allowed == "highest" else "tf32")
    if queries is keys:
        return Parts(1, keys, "ieee")
    # the numbers of 8 significant bits that make up one of 8, 11 or 24
    exact = {torch.bfloat16: 1, torch.float16: 2}.get(queries, 3)
    number = min(exact, {"highest": 3, "high": 2, "medium": 1}[allowed])
    return Parts(number, torch.bfloat16, "ieee")


class Launch(NamedTuple):
    """How large the first pass works."""

    block: int
    """Queries of a program."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles in flight."""


def list_launches(
    device: torch.device, num_queries: int, tile: int, dim: int, parts: Parts, key_bytes: int
) -> list[Launch]:
    """List what may fit into the shared memory of the device, the best first.

    Args:
        device: Where the keys are.
        num_queries: Queries of a problem.
        tile: Entries of a tile.
        dim: Width of a head, rounded up.
        parts: How queries are multiplied.
        key_bytes: Bytes of a number of a key.

    Returns:
        Sizes to try in turn: what the compiler adds to the operands is only estimated.
    """
    limit, is_hopper = math.inf, True
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        limit = properties.shared_memory_per_block_optin - _SHARED_SLACK
        is_hopper = properties.major in (9, 10)
    # Hopper and the data centre's Blackwell multiply from shared memory, others in registers
    is_split = parts.precision == "tf32x3"
    part_bytes = parts.dtype.itemsize
    # keys of another type than the parts are written once more, those split into two numbers twice
    copies = 2 * is_hopper if is_split else int(key_bytes != part_bytes)
    largest = min(128 if is_hopper or not is_split else 64, power_of_two(num_queries, 16))
    launches = []
    # the least that a matrix instruction takes is 16 queries
    for block, stages in ((128, 3), (128, 2), (64, 3), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2)):
        keys = tile * dim * (stages * key_bytes + copies * part_bytes)
        fits = keys + block * dim * parts.number * part_bytes <= limit
        if block <= largest and (fits or block == 16):
            warps = 8 if block > 64 or (block == 64 and not is_hopper) else 4
            launches.append(Launch(block, warps, stages))
    return launches
