"""Exact top-k on a GPU: group maxima in one pass of products, then the members of the best groups.

The `top_k` largest scores lie in the `top_k` groups with the largest maxima. So the pass over all
entries keeps one number of each group (`group_maxima`), a selection picks groups
(`select_largest`), the keys of their members are scored again (`score_members`), and the same
selection picks entries. No step depends on values for its shape: nothing waits for the device.

That is exact if the maxima are as good as float32 scores, which `byheart.ops.search_plan` sees to.
"""

import contextlib
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from byheart.ops.search_plan import Launch, Parts, Plan, choose_parts, list_launches
from byheart.ops.triton_door import (
    import_kernels,
    on_device_of,
    power_of_two,
    triton_dtype,
    without_eight_bits,
)

# up to this width one warp selects from a row; of wider rows the best groups are found first, where
# that leaves most of them out
_SELECTED_WIDTH = 1024
_COARSE_GROUP = 16

# a program of the first pass loads its queries once; 32 tiles of keys outweigh that by far, fewer
# are better if the device would not be busy otherwise (132 multiprocessors, several programs each)
_TILES_PER_PROGRAM = 32
_ENOUGH_PROGRAMS = 1024


class _Memory(NamedTuple):
    """The keys of all rows and heads (of 8 bits as integers), and what is needed to read them."""

    keys: Tensor
    dtype: torch.dtype
    valid: Tensor
    bias: Tensor
    has_bias: bool

    def arguments(self) -> tuple[int, ...]:
        """Return entries, key-value heads and the strides of row, head and entry."""
        return self.keys.shape[2], self.keys.shape[1], *self.keys.stride()[:3]


def _num_tiles(num_entries: int, plan: Plan) -> int:
    """Count tiles, with empty ones behind the entries where groups are to be grouped evenly.

    Returns:
        Tiles of each row and head.
    """
    # a level of coarse groups costs few empty tiles; the last is left out where it would cost many
    num_tiles, multiple = -(-num_entries // plan.tile), 1
    while (
        num_tiles * plan.groups_per_tile > _SELECTED_WIDTH * multiple
        and num_tiles >= 16 * multiple * _COARSE_GROUP
    ):
        multiple *= _COARSE_GROUP
    return -(-num_tiles // multiple) * multiple


def _maxima(
    queries_PQD: Tensor, memory: _Memory, first_problem: int, plan: Plan
) -> Float[Tensor, "problem query group"]:
    parts = choose_parts(queries_PQD.dtype, memory.dtype)
    dim, key_bytes = power_of_two(queries_PQD.shape[2], 16), memory.dtype.itemsize
    launches = list_launches(
        queries_PQD.device, queries_PQD.shape[1], plan.tile, dim, parts, key_bytes
    )
    too_large = import_kernels("search_kernels").OutOfResources
    while len(launches) > 1:
        launch = launches.pop(0)
        with contextlib.suppress(too_large):
            return _scan(queries_PQD, memory, first_problem, plan, parts, launch)
    return _scan(queries_PQD, memory, first_problem, plan, parts, launches[0])


def _scan(
    queries_PQD: Tensor,
    memory: _Memory,
    first_problem: int,
    plan: Plan,
    parts: Parts,
    launch: Launch,
) -> Float[Tensor, "problem query group"]:
    num_problems, num_queries, head_dim = queries_PQD.shape
    num_entries = memory.keys.shape[2]
    num_tiles = _num_tiles(num_entries, plan)
    num_blocks = -(-num_queries // launch.block)
    tiles = _TILES_PER_PROGRAM
    while tiles > 1 and num_problems * num_blocks * num_tiles < _ENOUGH_PROGRAMS * tiles:
        tiles //= 2
    splits = -(-num_tiles // tiles)
    padded_BN = torch.nn.functional.pad(memory.valid, (0, splits * tiles * plan.tile - num_entries))
    is_full_BS = padded_BN.view(-1, splits, tiles * plan.tile).amin(2)
    shape = (num_problems, num_queries, num_tiles * plan.groups_per_tile)
    maxima = torch.empty(shape, dtype=torch.float32, device=queries_PQD.device)
    import_kernels("search_kernels").group_maxima[num_blocks, splits, num_problems](
        queries_PQD,
        memory.keys,
        memory.valid,
        memory.bias,
        is_full_BS,
        maxima,
        first_problem,
        num_queries,
        num_entries,
        num_tiles,
        *memory.arguments()[1:],
        HEAD_DIM=head_dim,
        DIM_PAD=power_of_two(head_dim, 16),
        BLOCK_Q=launch.block,
        GROUP=plan.group,
        PER_TILE=plan.groups_per_tile,
        TILES=tiles,
        PARTS=parts.number,
        PRECISION=parts.precision,
        PART_DTYPE=triton_dtype(parts.dtype),
        KEY_DTYPE=triton_dtype(memory.dtype),
        HAS_BIAS=memory.has_bias,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return maxima


def select_largest(values_RN: Float[Tensor, "row column"], top_k: int) -> Int[Tensor, "row top_k"]:
    """List the columns of the largest values of each row, in no order of the values.

    Args:
        values_RN: Contiguous; NaN counts as larger or smaller than all, by its sign.
        top_k: Columns of each row, at most `column`.

    Returns:
        Columns, int32, each once.
    """
    num_rows, width = values_RN.shape
    if width <= max(_SELECTED_WIDTH, 2 * _COARSE_GROUP * top_k) or width % _COARSE_GROUP:
        return _select(values_RN, top_k)
    num_coarse = width // _COARSE_GROUP
    coarse_RC = torch.empty(num_rows, num_coarse, dtype=torch.float32, device=values_RN.device)
    block = 128
    import_kernels("search_kernels").coarse_maxima[(-(-coarse_RC.numel() // block),)](
        values_RN, coarse_RC, coarse_RC.numel(), _COARSE_GROUP, block, num_warps=4
    )
    return _select(values_RN, top_k, within=select_largest(coarse_RC, top_k))


def _select(values_RN: Tensor, top_k: int, within: Tensor | None = None) -> Tensor:
    """Select at once, from whole rows or `within` the coarse groups that each row names.

    Returns:
        Columns, as `select_largest` does.
    """
    num_rows, value_width = values_RN.shape
    width, coarse = value_width, 1
    if within is not None:
        width, coarse = within.shape[1] * _COARSE_GROUP, _COARSE_GROUP
    columns_RK = torch.empty(num_rows, top_k, dtype=torch.int32, device=values_RN.device)
    width_pad = power_of_two(width, 16)
    rows = max(1, 256 // width_pad)
    import_kernels("search_kernels").select_largest[(-(-num_rows // rows),)](
        values_RN,
        columns_RK if within is None else within,
        columns_RK,
        num_rows,
        width,
        value_width,
        TOP_K=top_k,
        WIDTH_PAD=width_pad,
        ROWS=rows,
        COARSE=coarse,
        num_warps=max(1, width_pad // _SELECTED_WIDTH),
    )
    return columns_RK


def _search_chunk(
    queries_PQD: Tensor, memory: _Memory, first_problem: int, top_k: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Search some queries of the problems from `first_problem` on.

    Returns:
        Scores, descending, slots and validity, as bytes.
    """
    kernels = import_kernels("search_kernels")
    num_problems, num_queries, head_dim = queries_PQD.shape
    maxima_PQG = _maxima(queries_PQD, memory, first_problem, plan)
    num_groups = min(top_k, maxima_PQG.shape[2])
    groups_RK = select_largest(maxima_PQG.flatten(0, 1), num_groups)
    del maxima_PQG
    num_rows, num_members = groups_RK.shape[0], num_groups * plan.group
    members_pad = power_of_two(num_members, 16)
    scores_RM = torch.empty(num_rows, num_members, device=queries_PQD.device, dtype=torch.float32)
    kernels.score_members[num_queries, num_problems](
        queries_PQD,
        memory.keys,
        memory.valid,
        memory.bias,
        groups_RK,
        scores_RM,
        first_problem,
        num_queries,
        *memory.arguments(),
        HEAD_DIM=head_dim,
        GROUP=plan.group,
        PER_TILE=plan.groups_per_tile,
        NUM_GROUPS=num_groups,
        MEMBERS_PAD=members_pad,
        BLOCK_D=16,
        KEY_DTYPE=triton_dtype(memory.dtype),
        HAS_BIAS=memory.has_bias,
        num_warps=8 if members_pad > 1024 else 4,
    )
    chosen_RK = select_largest(scores_RM, top_k)
    shape = (num_problems, num_queries, top_k)
    found = tuple(
        torch.empty(shape, dtype=dtype, device=queries_PQD.device)
        for dtype in (torch.float32, torch.int64, torch.uint8)
    )
    kernels.order_chosen[(num_rows,)](
        scores_RM,
        groups_RK,
        chosen_RK,
        *found,
        TOP_K=top_k,
        TOP_K_PAD=power_of_two(top_k, 16),
        GROUP=plan.group,
        PER_TILE=plan.groups_per_tile,
        NUM_GROUPS=num_groups,
        num_warps=1 if top_k <= 32 else 4,
    )
    return found[0], found[1], found[2]


def search(
    queries_BGQD: Float[Tensor, "batch kv_heads query head_dim"],
    keys_BGND: Float[Tensor, "batch kv_heads entry head_dim"],
    valid_BN: Bool[Tensor, "batch entry"],
    bias_BN: Float[Tensor, "batch entry"] | None,
    top_k: int,
    max_bytes: int,
    plan: Plan,
) -> tuple[
    Float[Tensor, "batch kv_heads query top_k"],
    Int[Tensor, "batch kv_heads query top_k"],
    Bool[Tensor, "batch kv_heads query top_k"],
]:
    """Find the keys with the largest inner products.

    Args:
        queries_BGQD: All queries of the heads that share a key-value head, in any floating type.
        keys_BGND: Keys of the types that `plan_search` knows.
        valid_BN: `True` where the slot holds an entry.
        bias_BN: Added to the scores of each entry, in float32 and finite.
        top_k: Neighbours per query, at most `entry`.
        max_bytes: Bytes of group maxima held at a time.
        plan: How entries are grouped.

    Returns:
        Scores, descending, slots and validity.
    """
    batch, kv_heads, num_queries, head_dim = queries_BGQD.shape
    if queries_BGQD.dtype is torch.float64:
        queries_BGQD = queries_BGQD.float()
    queries_PQD = queries_BGQD.reshape(-1, num_queries, head_dim).contiguous()
    if keys_BGND.stride(3) != 1:
        keys_BGND = keys_BGND.contiguous()
    valid = valid_BN.contiguous().view(torch.uint8)
    # a pointer is passed in any case; without a bias it is not read
    bias = valid if bias_BN is None else bias_BN.contiguous()
    keys = without_eight_bits(keys_BGND)
    memory = _Memory(keys, keys_BGND.dtype, valid, bias, bias_BN is not None)
    width = _num_tiles(keys_BGND.shape[2], plan) * plan.groups_per_tile
    step_Q = min(num_queries, max(1, max_bytes // (4 * width)))
    step_P = max(1, max_bytes // (4 * width * num_queries))
    with on_device_of(queries_BGQD):
        pieces = [
            _search_chunk(
                queries_PQD[p : p + step_P, q : q + step_Q].contiguous(), memory, p, top_k, plan
            )
            for p in range(0, batch * kv_heads, step_P)
            for q in range(0, num_queries, step_Q)
        ]
    # pieces are either whole problems or parts of one
    shape = (batch, kv_heads, num_queries, top_k)
    scores, slots, valid = (
        side[0] if len(side) == 1 else torch.cat([piece.flatten(0, 1) for piece in side])
        for side in zip(*pieces, strict=True)
    )
    return scores.view(shape), slots.view(shape), valid.view(torch.bool).view(shape)
