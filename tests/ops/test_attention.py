import pytest
import torch

from byheart.ops import reference
from byheart.ops.attention import EXCLUDED, masked_attention, window_attention

BATCH, HEADS, HEAD_DIM = 2, 3, 5


def make_inputs(num_queries, cache_length, window, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    num_keys = cache_length + num_queries
    inputs = (
        draw(BATCH, HEADS, num_queries, HEAD_DIM),
        draw(BATCH, HEADS, num_keys, HEAD_DIM),
        draw(BATCH, HEADS, num_keys, HEAD_DIM),
        draw(HEADS, window + 1),
    )
    # the first row has no cache, the second some of it
    cache_valid = torch.rand(BATCH, cache_length) < 0.6
    cache_valid[0] = False
    return inputs, cache_valid


def assert_same_with_gradients(fast, slow, inputs):
    for mine, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, theirs)
    weights = [torch.randn_like(side) for side in slow]
    gradients = [torch.autograd.grad(side, inputs, weights) for side in (fast, slow)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("self_visible", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "cache_length", "window", "block_length"),
    [
        pytest.param(7, 7, 7, 128, id="one block"),
        pytest.param(11, 7, 7, 3, id="blocks that do not divide the segment"),
        pytest.param(11, 7, 3, 4, id="window shorter than the cache"),
        pytest.param(7, 3, 13, 5, id="window longer than the cache and the segment"),
        pytest.param(11, 0, 5, 4, id="no cache"),
        pytest.param(1, 5, 3, 1, id="one query"),
        pytest.param(5, 2, 1, 2, id="window of one token"),
    ],
)
def test_window_attention_equals_its_twin(
    num_queries, cache_length, window, block_length, self_visible
):
    inputs, cache_valid = make_inputs(num_queries, cache_length, window)
    fast = window_attention(
        *inputs,
        cache_valid,
        self_visible=self_visible,
        need_logsumexp=True,
        block_length=block_length,
    )
    bias, visible = reference.window_view(
        inputs[3], cache_valid, num_queries, self_visible=self_visible
    )
    assert_same_with_gradients(fast, reference.attention(*inputs[:3], bias, visible), inputs)


def test_masked_attention_equals_its_twin():
    num_queries, num_keys = 5, 7
    inputs, _ = make_inputs(num_queries, num_keys - num_queries, 1)
    bias = torch.randn(BATCH, HEADS, num_queries, num_keys, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(BATCH, num_queries, num_keys) < 0.5
    visible[1, 2] = False
    inputs = (*inputs[:3], bias)
    fast = masked_attention(*inputs, visible, need_logsumexp=True)
    assert_same_with_gradients(fast, reference.attention(*inputs, visible), inputs)


def test_query_that_sees_nothing_returns_zero_and_finite_gradients():
    inputs, _ = make_inputs(1, 4, 3, torch.float32)
    attended = window_attention(
        *inputs,
        torch.zeros(BATCH, 4, dtype=torch.bool),
        self_visible=False,
        need_logsumexp=True,
    )
    assert (attended.output == 0).all()
    assert (attended.logsumexp == EXCLUDED).all()
    for gradient in torch.autograd.grad(attended.output.sum() + attended.logsumexp.sum(), inputs):
        assert (gradient == 0).all()


def test_window_of_zero_shows_nothing_but_the_token_itself():
    (queries, keys, values, bias), cache_valid = make_inputs(3, 2, 0)
    cache_valid[:] = True
    alone = window_attention(queries, keys, values, bias, cache_valid, self_visible=True)
    torch.testing.assert_close(alone.output, values[:, :, 2:])
    nothing = window_attention(queries, keys, values, bias, cache_valid, self_visible=False)
    assert (nothing.output == 0).all()


def test_window_is_exactly_as_long_as_the_biases_say():
    num_queries, cache_length, window = 7, 5, 4
    (queries, keys, values, bias), _ = make_inputs(num_queries, cache_length, window)
    cache_valid = torch.ones(BATCH, cache_length, dtype=torch.bool)
    output = window_attention(queries, keys, values, bias, cache_valid, self_visible=False).output
    for query in range(num_queries):
        (reached,) = torch.autograd.grad(output[:, :, query].sum(), values, retain_graph=True)
        place = cache_length + query
        seen = [n for n in range(keys.shape[2]) if reached[:, :, n].any()]
        assert seen == list(range(place - window, place))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_free_of_nan(dtype):
    inputs, cache_valid = make_inputs(7, 5, 4)
    exact = window_attention(*inputs, cache_valid, self_visible=False, need_logsumexp=True)
    inputs = [side.detach().to(dtype).requires_grad_() for side in inputs]
    half = window_attention(*inputs, cache_valid, self_visible=False, need_logsumexp=True)
    assert half.output.dtype == dtype
    assert half.logsumexp.dtype == torch.float32
    # scores of size 5 carry an absolute error of about 5 * 2**-8 in bfloat16
    torch.testing.assert_close(half.output.double(), exact.output, atol=0.1, rtol=0.1)
    torch.testing.assert_close(half.logsumexp.double(), exact.logsumexp, atol=0.1, rtol=0.1)
    for gradient in torch.autograd.grad(half.output.float().sum(), inputs):
        assert gradient.isfinite().all()


def test_autocast_computes_scores_in_float32():
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 3, 17, 5, generator=generator)
    bias = torch.zeros(3, 18)
    cache_valid = torch.zeros(2, 0, dtype=torch.bool)
    arguments = (10 * queries, keys, values, bias, cache_valid)
    exact = window_attention(*arguments, self_visible=True, need_logsumexp=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = window_attention(*arguments, self_visible=True, need_logsumexp=True)
    torch.testing.assert_close(cast.logsumexp, exact.logsumexp)
    # weights and values are rounded to bfloat16, the scores are not
    torch.testing.assert_close(cast.output.float(), exact.output, atol=0.02, rtol=0.02)
