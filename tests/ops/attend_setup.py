"""Small memories for the tests of attention over them, and what must be equal."""

import torch

BATCH, HEADS, KV_HEADS, QUERIES, ENTRIES, HEAD_DIM = 3, 4, 2, 5, 11, 13


def make_inputs(dtype=torch.float64, store_dtype=None):
    queries = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM, dtype=dtype, requires_grad=True)
    scale = (torch.rand(HEADS, dtype=dtype) + 0.5).requires_grad_()
    keys, values = torch.randn(2, BATCH, KV_HEADS, ENTRIES, HEAD_DIM, dtype=dtype)
    return queries, scale, keys.to(store_dtype or dtype), values.to(store_dtype or dtype)


def assert_same_with_gradients(fast, slow, queries, scale):
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, theirs)
    weights = [torch.randn_like(side) for side in slow]
    gradients = [torch.autograd.grad(side, (queries, scale), weights) for side in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
