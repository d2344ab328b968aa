"""Attention over retrieved entries on a GPU: one kernel forward, one backward.

The same function as `byheart.ops.gather`, which decides which of the two runs. Forward reads the
values, backward values and keys again: neither is kept, nor anything of their gathered size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from byheart.ops.triton_door import (
    HALF_DTYPES,
    import_kernels,
    on_device_of,
    power_of_two,
    triton_dtype,
    uses_kernels,
    without_eight_bits,
)

# a number per neighbour and a part of the width of all entries lie in the registers of one program,
# of which a warp has room for so many
_MAX_TOP_K = 1024
_NUMBERS_PER_WARP = 1024
_MAX_WARPS = 8


def uses_gather_kernels(queries: Tensor, keys: Tensor, values: Tensor, top_k: int) -> bool:
    """Say whether kernels attend: they work here and know these types and sizes.

    Args:
        queries: Queries.
        keys: All slots of the memory.
        values: All slots of the memory.
        top_k: Neighbours per query.

    Returns:
        `False` where the operators of PyTorch are to be used.
    """
    if queries.dtype not in (torch.float32, *HALF_DTYPES) or top_k > _MAX_TOP_K:
        return False
    return uses_kernels(queries, keys.dtype) and uses_kernels(queries, values.dtype)


class KernelGatherAttend(torch.autograd.Function):
    """`byheart.ops.gather.gather_attend` by kernels; gradients to queries and scale."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        scale: Tensor,
        keys: Tensor,
        values: Tensor,
        scores: Tensor,
        slots: Tensor,
        valid: Tensor,
        bias: Tensor | None,
        empty_as_zero: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Returns:
            Output and log of the softmax denominators.
        """
        output, logsumexp = _attend(
            queries, scale, values, scores, slots, valid, bias, empty_as_zero
        )
        # keys, too, although only backward reads them: autograd then notices if they are written
        ctx.save_for_backward(queries, scale, keys, values, scores, slots, valid, bias, logsumexp)
        ctx.empty_as_zero = empty_as_zero
        return output, logsumexp

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Carry the gradient to queries and scale.

        Returns:
            A gradient or `None` for each argument of `forward`.
        """
        queries, scale, keys, values, scores, slots, valid, bias, logsumexp = ctx.saved_tensors
        grad_queries, grad_scale_BHQ = _attend_backward(
            grad_output, grad_logsumexp, logsumexp, queries, scale, keys, values,
            scores, slots, valid, bias, ctx.empty_as_zero,
        )  # fmt: skip
        grad_scale = grad_scale_BHQ.sum((0, 2)).to(scale.dtype)
        return grad_queries, grad_scale, None, None, None, None, None, None, None


def _sizes(queries: Tensor, entries: Tensor, top_k: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the sizes that both kernels take, and those that they are compiled for."""
    _, heads, num_queries, head_dim = queries.shape
    top_k_pad = power_of_two(top_k, 16)
    # 64 numbers of 16 bits are a line of the cache
    block = max(
        16, min(64, power_of_two(head_dim, 16), _MAX_WARPS * _NUMBERS_PER_WARP // top_k_pad)
    )
    warps = min(_MAX_WARPS, max(1, top_k_pad * block // _NUMBERS_PER_WARP))
    constants = {"HEAD_DIM": head_dim, "TOP_K": top_k, "TOP_K_PAD": top_k_pad, "BLOCK_D": block}
    return (num_queries, heads, heads // entries.shape[1]), {**constants, "num_warps": warps}


def _readable(entries: Tensor) -> Tensor:
    return without_eight_bits(entries if entries.stride(3) == 1 else entries.contiguous())


def _found(
    scores: Tensor, slots: Tensor, valid: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what kernels read of each neighbour; without a bias a pointer that they do not read.

    Returns:
        Scores, slots, validity as bytes, bias.
    """
    is_valid = valid.contiguous().view(torch.uint8)
    bias = is_valid if bias is None else bias.contiguous()
    return scores.contiguous(), slots.contiguous(), is_valid, bias


@torch.library.custom_op("byheart::gather_attend", mutates_args=())
def _attend(
    queries: Tensor,
    scale: Tensor,
    values: Tensor,
    scores: Tensor,
    slots: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    empty_as_zero: bool,
) -> tuple[Tensor, Tensor]:
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    logsumexp = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    if output.numel() == 0:
        return output, logsumexp
    sizes, constants = _sizes(queries, values, slots.shape[3])
    grid = (queries.shape[2], queries.shape[0] * queries.shape[1])
    entries = _readable(values)
    with on_device_of(queries):
        import_kernels("gather_kernels").attend[grid](
            scale.contiguous(),
            entries,
            *_found(scores, slots, valid, bias),
            output,
            logsumexp,
            *sizes,
            *entries.stride()[:3],
            ENTRY_DTYPE=triton_dtype(values.dtype),
            HAS_BIAS=bias is not None,
            EMPTY_AS_ZERO=empty_as_zero,
            **constants,
        )
    return output, logsumexp


@_attend.register_fake
def _(
    queries: Tensor,
    scale: Tensor,
    values: Tensor,
    scores: Tensor,
    slots: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    empty_as_zero: bool,
) -> tuple[Tensor, Tensor]:
    output = queries.new_empty(queries.shape)
    return output, queries.new_empty(queries.shape[:3], dtype=torch.float32)


@torch.library.custom_op("byheart::gather_attend_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    logsumexp: Tensor,
    queries: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    slots: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    empty_as_zero: bool,
) -> tuple[Tensor, Tensor]:
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_scale_BHQ = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    if grad_queries.numel() == 0:
        return grad_queries, grad_scale_BHQ
    sizes, constants = _sizes(queries, keys, slots.shape[3])
    grid = (queries.shape[2], queries.shape[0] * queries.shape[1])
    key_entries, value_entries = _readable(keys), _readable(values)
    with on_device_of(queries):
        import_kernels("gather_kernels").attend_backward[grid](
            grad_output.contiguous(),
            grad_logsumexp.contiguous(),
            logsumexp.contiguous(),
            scale.contiguous(),
            key_entries,
            value_entries,
            *_found(scores, slots, valid, bias),
            grad_queries,
            grad_scale_BHQ,
            *sizes,
            *key_entries.stride()[:3],
            *value_entries.stride()[:3],
            KEY_DTYPE=triton_dtype(keys.dtype),
            VALUE_DTYPE=triton_dtype(values.dtype),
            HAS_BIAS=bias is not None,
            EMPTY_AS_ZERO=empty_as_zero,
            **constants,
        )
    return grad_queries, grad_scale_BHQ


@_attend_backward.register_fake
def _(
    grad_output: Tensor,
    grad_logsumexp: Tensor,
    logsumexp: Tensor,
    queries: Tensor,
    scale: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    slots: Tensor,
    valid: Tensor,
    bias: Tensor | None,
    empty_as_zero: bool,
) -> tuple[Tensor, Tensor]:
    grad_queries = queries.new_empty(queries.shape)
    return grad_queries, queries.new_empty(queries.shape[:3], dtype=torch.float32)
