"""Whether weights have changed is seen in every one of their bits."""

import pytest
import torch

from byheart.models.fingerprint import _WIDTH, weight_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_see_every_bit_of_every_weight(dtype):
    # whole rows of words, a rest, and bytes behind the last word
    shape = (2 * _WIDTH + 3) * 8 // dtype.itemsize + 1
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    before = weight_sums(module)
    for place in (0, 1, shape // 2, shape - 2, shape - 1):
        old = module.weight[place].item()
        module.weight.data[place] += 1
        assert weight_sums(module) != before
        module.weight.data[place] = old
        assert weight_sums(module) == before
    module.weight.data[:2] = module.weight.data[:2].flip(0)
    assert weight_sums(module) != before


class Sharded(torch.Tensor):
    """A tensor that stands for others, as of a model in several processes."""


def test_weights_whose_bits_cannot_be_read_always_count_as_changed():
    module = torch.nn.Linear(2, 3)
    assert weight_sums(module) == weight_sums(module)
    module.bias = torch.nn.Parameter(torch.zeros(3).as_subclass(Sharded))
    assert weight_sums(module) != weight_sums(module)
