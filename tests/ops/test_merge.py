import pytest
import torch

from byheart.ops import reference
from byheart.ops.attention import EXCLUDED, masked_attention
from byheart.ops.merge import merge_by_gate, merge_by_softmax

BATCH, HEADS, QUERIES, HEAD_DIM = 2, 3, 5, 7


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "gate_shape",
    [
        pytest.param((1, HEADS, 1), id="per head"),
        pytest.param((BATCH, HEADS, 1), id="per row and head"),
        pytest.param((BATCH, HEADS, QUERIES), id="per token and head"),
    ],
)
def test_merge_by_gate_equals_its_twin(gate_shape):
    local, memory = (draw(BATCH, HEADS, QUERIES, HEAD_DIM) for _ in range(2))
    bias = draw(*gate_shape)
    inputs = (local, memory, bias)
    fast = merge_by_gate(local, memory, torch.sigmoid(bias))
    slow = reference.merge_by_gate(local, memory, torch.sigmoid(bias))
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    gradients = [torch.autograd.grad(side, inputs, weight) for side in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_gate_is_local_attention_bit_for_bit(dtype):
    local, memory = torch.randn(2, BATCH, HEADS, QUERIES, HEAD_DIM).to(dtype)
    assert torch.equal(merge_by_gate(local, memory * 1e6, torch.zeros(1, HEADS, 1)), local)


def test_open_gate_is_memory_attention_bit_for_bit():
    local, memory = torch.randn(2, BATCH, HEADS, QUERIES, HEAD_DIM)
    assert torch.equal(merge_by_gate(local, memory, torch.ones(1, HEADS, 1)), memory)


def test_merge_by_softmax_equals_its_twin():
    outputs = [draw(BATCH, HEADS, QUERIES, HEAD_DIM) for _ in range(3)]
    logsumexps = [draw(BATCH, HEADS, QUERIES) for _ in range(3)]
    fast = merge_by_softmax(outputs, logsumexps)
    slow = reference.merge_by_softmax(outputs, logsumexps)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(slow)
    gradients = [torch.autograd.grad(side, outputs + logsumexps, weight) for side in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_merge_by_softmax_is_one_softmax_over_all_keys():
    sizes = (11, 13, 2)
    queries = draw(BATCH, HEADS, QUERIES, HEAD_DIM)
    keys, values = (draw(BATCH, HEADS, sum(sizes), HEAD_DIM) for _ in range(2))
    bias = draw(BATCH, HEADS, QUERIES, sum(sizes))
    visible = torch.rand(BATCH, QUERIES, sum(sizes)) < 0.8
    visible[0, 0, : sizes[0]] = False  # nothing to see in one part
    inputs = (queries, keys, values, bias)
    whole = masked_attention(*inputs, visible).output
    parts = [
        masked_attention(queries, *sides, need_logsumexp=True)
        for sides in zip(
            keys.split(sizes, dim=2),
            values.split(sizes, dim=2),
            bias.split(sizes, dim=3),
            visible.split(sizes, dim=2),
            strict=True,
        )
    ]
    merged = merge_by_softmax(*map(list, zip(*parts, strict=True)))
    torch.testing.assert_close(merged, whole)
    weight = torch.randn_like(whole)
    gradients = [torch.autograd.grad(side, inputs, weight) for side in (merged, whole)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_empty_set_takes_no_part_in_the_softmax_merge():
    local = torch.randn(BATCH, HEADS, QUERIES, HEAD_DIM)
    logsumexp = torch.randn(BATCH, HEADS, QUERIES)
    empty = torch.full_like(logsumexp, EXCLUDED)
    assert torch.equal(merge_by_softmax([local, 0 * local], [logsumexp, empty]), local)


def test_softmax_merge_of_empty_sets_is_zero():
    zeros = torch.zeros(BATCH, HEADS, QUERIES, HEAD_DIM)
    empty = torch.full((BATCH, HEADS, QUERIES), EXCLUDED)
    assert torch.equal(merge_by_softmax([zeros, zeros], [empty, empty]), zeros)


def test_softmax_merge_keeps_the_dtype_of_the_first_output():
    outputs = list(torch.randn(2, BATCH, HEADS, QUERIES, HEAD_DIM))
    logsumexps = list(torch.randn(2, BATCH, HEADS, QUERIES))
    outputs[0] = outputs[0].bfloat16()
    assert merge_by_softmax(outputs, logsumexps).dtype == torch.bfloat16
