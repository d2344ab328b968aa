"""What replay keeps of its segments; its gradients are in `test_recurrent`."""

import torch
from torch import nn

from byheart.models.replay import _SmallTensors, replayed


def read_all(num_segments, output):
    """Replay segments that each add the weight to the memory."""
    weight = nn.Parameter(torch.tensor(0.5))

    def read(index, memory):
        after = memory + weight
        return after, output(index, after)

    outputs, _ = replayed(read, num_segments, torch.zeros(1, 2, 3), [weight])
    return outputs, weight


def storages(tensors):
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def test_small_outputs_lie_together():
    # by themselves they lie among what every segment needs for a moment, and some processes took a
    # quarter more memory for 256 segments than for 4
    outputs, _ = read_all(200, lambda _, memory: memory.mean(-1))
    assert storages(outputs) <= 4
    torch.testing.assert_close(
        torch.stack(outputs), 0.5 * torch.arange(1, 201.0)[:, None, None].expand(-1, 1, 2)
    )


def test_outputs_of_many_shapes_are_kept_apart():
    outputs, weight = read_all(
        7, lambda index, memory: (None, memory[..., : index % 3], memory.sum().double())
    )
    for index, (nothing, part, total) in enumerate(outputs):
        assert nothing is None
        torch.testing.assert_close(part, torch.full((1, 2, index % 3), 0.5 * (index + 1)))
        torch.testing.assert_close(total, torch.tensor(3.0 * (index + 1)).double())
    (outputs[3][2] + outputs[5][1].sum()).backward()
    assert weight.grad == 4 * 6 + 6 * 4


def test_large_outputs_have_their_own_memory():
    # a whole block would live as long as any of its pieces
    outputs, _ = read_all(3, lambda _, memory: memory.mean() * torch.ones(1 << 15))
    assert storages(outputs) == 3


def test_an_output_can_be_changed_in_place():
    (first, second), weight = read_all(2, lambda _, memory: memory.sum())
    kept = second.detach().clone()
    first.mul_(2)
    assert torch.equal(second, kept)
    (first + second).backward()
    assert weight.grad == 2 * 6 + 2 * 6


def test_a_compiler_that_does_not_know_the_sizes_can_read_it():
    keep = torch.compile(
        lambda tensor: _SmallTensors(1).keep(tensor), backend="eager", dynamic=True
    )
    large = torch.ones(2, 1 << 15)
    assert torch.equal(keep(large), large)
