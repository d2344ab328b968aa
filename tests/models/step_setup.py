"""Models, rows and comparisons for tests of whole steps."""

import torch

from byheart.memory.config import KnnMemoryConfig
from byheart.testing.tiny import random_tokens, tiny_config

SEGMENT = 7

CONFIGS = {
    "gate": {},
    "joint": {"combine": "joint", "age_slope": 0.5},
    "content gate": {"combine": "content_gate", "write": "evicted"},
    "whole memory": {"memory_size": 5, "age_slope": 0.5},
    "buckets": {"search": "strided_bucket", "memory_size": 21, "num_buckets": 7},
    "no memory": None,
}


def make_config(name, **changes):
    options = CONFIGS[name]
    if options is None:
        return tiny_config(memory_size=0, **changes)
    memory = KnnMemoryConfig(**{"layers": (1,), "memory_size": 17, "top_k": 5, **options})
    return tiny_config(memory=memory, position_bias="t5", **changes)


def batches(device="cpu"):
    """Give segments of two rows: one whole, one that ends a document and begins others."""
    tokens = random_tokens(2, 6 * SEGMENT + 1)
    counts = [7, 3, 7, 7, 5, 7]
    starts = [True, False, True, False, False, True]
    for index, (count, start) in enumerate(zip(counts, starts, strict=True)):
        piece = tokens[:, index * SEGMENT : (index + 1) * SEGMENT + 1].to(device)
        num_tokens = torch.tensor([SEGMENT, count], device=device)
        columns = torch.arange(SEGMENT, device=device)
        yield {
            "input_ids": piece[:, :-1],
            "targets": torch.where(columns < num_tokens[:, None], piece[:, 1:], -100),
            "num_tokens": num_tokens,
            "document_start": torch.tensor([index == 0, start], device=device),
        }


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    # gradients are sums over thousands of terms, in another order
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=1e-4)
    assert_same_state(found[2], expected[2])


def assert_same_state(found, expected):
    for name in ("num_cached", "num_pending", "position"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.xl_cache, expected.xl_cache)
    for layer, store in expected.stores.items():
        assert torch.equal(found.stores[layer].num_written, store.num_written)
        torch.testing.assert_close(found.stores[layer].keys, store.keys)
        torch.testing.assert_close(found.stores[layer].values, store.values)
    # a segment without tokens may be kept where nobody knows that it has none
    used = torch.arange(SEGMENT) < expected.num_pending[:, None]
    for layer, pending in enumerate(expected.pending or ()):
        for side, kept in enumerate(pending):
            mask = used[:, None, :, None]
            torch.testing.assert_close(found.pending[layer][side] * mask, kept * mask)
