import pytest
import torch

from byheart.ops import reference
from byheart.ops.positions import apply_rope, rope_angles, t5_buckets, undo_rope


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (14, 1000)])
def test_t5_buckets_equal_their_twin(num_buckets, max_distance):
    distances = torch.arange(2 * max_distance)
    expected = [reference.t5_bucket(n, num_buckets, max_distance) for n in distances.tolist()]
    assert t5_buckets(distances, num_buckets, max_distance).tolist() == expected


def test_t5_buckets_by_hand():
    # 16 exact ones; then 16 * 8 ** (step / 16), so that 32 is 5.3 steps and 128 all sixteen
    distances = torch.tensor([[0, 15, 16], [32, 127, 10**6]])
    assert t5_buckets(distances).tolist() == [[0, 15, 16], [21, 31, 31]]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_equals_its_twin(theta):
    batch, heads, length, head_dim = 2, 3, 5, 14
    x = torch.randn(batch, heads, length, head_dim, requires_grad=True)
    positions = torch.tensor([-7, 0, 1, 2, 113])
    fast = apply_rope(x, *rope_angles(positions, head_dim, theta))
    slow = torch.stack(
        [
            reference.rotate(x[b, h, s], int(positions[s]), theta)
            for b in range(batch)
            for h in range(heads)
            for s in range(length)
        ]
    ).view_as(x)
    # float32 angles of 113 radians are off by up to 4e-6, and so are their sines
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=0)
    weight = torch.randn_like(slow)
    gradients = [torch.autograd.grad(side, x, weight)[0] for side in (fast, slow)]
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=0)


def test_rotary_scores_depend_on_the_distance_only():
    head_dim, num_steps = 14, 11
    query, key = torch.randn(2, head_dim)
    here = torch.arange(num_steps)
    scores = [
        (
            apply_rope(query.expand(num_steps, -1), *rope_angles(here + shift, head_dim))
            * apply_rope(key.expand(num_steps, -1), *rope_angles(here + shift - 3, head_dim))
        ).sum(-1)
        for shift in (0, 17)
    ]
    # the rounding of the angles, as above
    torch.testing.assert_close(scores[0], scores[0][:1].expand(num_steps), atol=2e-5, rtol=0)
    torch.testing.assert_close(*scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [1.0, 1.3], ids=["plain", "YaRN"])
def test_undo_rope_is_the_inverse_of_apply_rope(length):
    x = torch.randn(2, 3, 5, 14)
    cos, sin = (length * side for side in rope_angles(torch.arange(40, 45), 14))
    torch.testing.assert_close(undo_rope(apply_rope(x, cos, sin), cos, sin), x)


def test_rope_keeps_the_dtype():
    x = torch.randn(5, 14, dtype=torch.bfloat16)
    assert apply_rope(x, *rope_angles(torch.arange(5), 14)).dtype == torch.bfloat16


def test_rope_refuses_an_odd_head():
    with pytest.raises(ValueError, match="head_dim must be even for rotary positions, got 7"):
        rope_angles(torch.arange(3), 7)
