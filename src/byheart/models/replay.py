"""Exact backpropagation through any number of segments in constant memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ReadSegment = Callable[[int, Tensor], tuple[Tensor, Any]]
"""Reads the segment of an index with the memory before it: the memory after it, and its output: a
tensor, `None`, or a named tuple of outputs."""


def replayed(
    read: ReadSegment,
    num_segments: int,
    memory: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    keeps_last: bool = False,
) -> tuple[list[Any], Tensor]:
    """Read segments, and read them again in reverse for the backward pass.

    Only the memory before each segment is kept, in one block, with the random state. So the
    activations of one segment exist at a time, gradients are those of keeping them all, and the
    allocator has no small long-lived pieces to work around: small outputs of one shape, such as
    losses, are kept in blocks too. Costs one more forward pass.

    Args:
        read: Reads one segment. It must do the same each time, given the same random state.
        num_segments: How many there are.
        memory: Memory before the first.
        parameters: All parameters that `read` uses and that want a gradient.
        keeps_last: Whether the activations of the last segment are kept: the backward pass begins
            with it, so that it need not be read again, and no more exist at a time.

    Returns:
        The output of each segment, and the memory after the last.

    Source:
        Wu et al. 2020, Memformer, memory replay back-propagation (arXiv:2010.06891).
    """
    plan = _Plan(read, num_segments, memory.device, keeps_last=keeps_last)
    memory, *flat = _Replay.apply(plan, memory, *parameters)  # type: ignore[no-untyped-call]
    tensors = iter(flat)
    outputs = [_filled(output, tensors) for output in plan.outputs]
    # the plan lives as long as the graph of these tensors, and must not keep them in turn
    plan.outputs.clear()
    return outputs, memory


_SMALL_BYTES, _PER_BLOCK = 1 << 16, 64


class _Plan:
    """What the backward pass needs to know besides tensors."""

    def __init__(
        self, read: ReadSegment, num_segments: int, device: torch.device, *, keeps_last: bool
    ) -> None:
        self.read = read
        self.num_segments = num_segments
        self.outputs: list[Any] = []
        self.counts: list[int] = []
        self.last = num_segments - 1 if keeps_last else None
        self.kept: _Graph | None = None
        self.kind = device.type
        self.devices = [device] if device.type == "cuda" else []
        self.random = [
            torch.empty(num_segments, len(state), dtype=torch.uint8) for state in self._states()
        ]
        # backward runs outside of autocast, and must compute what forward has computed
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.autocast_dtype = torch.get_autocast_dtype(self.kind)

    def _states(self) -> list[Tensor]:
        return [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state(device) for device in self.devices),
        ]

    def keep_random_state(self, index: int) -> None:
        for block, state in zip(self.random, self._states(), strict=True):
            block[index] = state

    def restore_random_state(self, index: int) -> None:
        # copies: torch 2.13 crashes on a state that is a view into a larger tensor
        torch.set_rng_state(self.random[0][index].clone())
        for device, block in zip(self.devices, self.random[1:], strict=True):
            torch.cuda.set_rng_state(block[index].clone(), device)

    def first(self, index: int, memory: Tensor) -> tuple[Tensor, Any]:
        """Read a segment for the first time.

        Returns:
            The memory after it, and its output, both without a gradient.
        """
        self.keep_random_state(index)
        if index != self.last:
            return self.read(index, memory)
        self.kept, output = self._graph(index, memory)
        after, *flat = (tensor.detach() for tensor in self.kept.outputs)
        return after, _filled(output, iter(flat))

    def again(self, index: int, memory: Tensor) -> "_Graph":
        """Give a segment with its gradient, read again unless it was kept.

        Returns:
            What it was read from, and what that gave.
        """
        if index == self.last and self.kept is not None:
            graph, self.kept = self.kept, None
            return graph
        self.restore_random_state(index)
        return self._graph(index, memory)[0]

    def _graph(self, index: int, memory: Tensor) -> tuple["_Graph", Any]:
        memory = memory.detach().requires_grad_()
        with (
            torch.enable_grad(),
            torch.autocast(self.kind, enabled=self.autocast, dtype=self.autocast_dtype),
        ):
            after, output = self.read(index, memory)
        return _Graph(memory, [after, *_tensors(output)]), output


class _Graph(NamedTuple):
    """A segment with its gradient."""

    memory: Tensor
    outputs: list[Tensor]


class _SmallTensors:
    """Keeps small tensors of one shape in blocks.

    Each by itself would lie among the activations of its segment, and what is free around it fits
    no other: on the CPU some processes took a quarter more for 256 segments than for 4.
    """

    def __init__(self, num_segments: int) -> None:
        self.per_block = min(num_segments, _PER_BLOCK)
        self.blocks: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Keep what a segment gave.

        Returns:
            A tensor that holds the same.
        """
        # a compiler that does not know the sizes beforehand cannot say `nbytes`
        if tensor.numel() * tensor.element_size() > _SMALL_BYTES:
            return tensor
        free = self.blocks.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        if not free:
            block = tensor.new_empty(self.per_block, *tensor.shape)
            # no views, which autograd would not let anybody change in place
            free += [
                block.new_empty(0).set_(
                    block.untyped_storage(), piece.storage_offset(), piece.shape, piece.stride()
                )
                for piece in block
            ]
        return free.pop().copy_(tensor)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, memory: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        before = memory.new_empty(plan.num_segments, *memory.shape)
        flat: list[Tensor] = []
        small = _SmallTensors(plan.num_segments)
        for index in range(plan.num_segments):
            before[index] = memory
            memory, output = plan.first(index, memory)
            tensors = [small.keep(tensor) for tensor in _tensors(output)]
            plan.outputs.append(_filled(output, iter(tensors)))
            plan.counts.append(len(tensors))
            flat += tensors
        ctx.plan, ctx.num_parameters = plan, len(parameters)
        ctx.save_for_backward(before, *parameters)
        ctx.set_materialize_grads(False)
        # an output must not be an input
        return (memory.clone(), *flat)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        before, *parameters = ctx.saved_tensors
        plan: _Plan = ctx.plan
        totals: list[Tensor | None] = [None] * len(parameters)
        end = len(grad_outputs)
        with torch.random.fork_rng(devices=plan.devices, device_type="cuda"):
            for index in reversed(range(plan.num_segments)):
                start = end - plan.counts[index]
                wanted = [grad, *grad_outputs[start:end]]
                end = start
                if all(part is None for part in wanted):
                    # two segments must not exist at a time
                    plan.kept = None
                    continue
                grad, *found = _gradients(plan.again(index, before[index]), wanted, parameters)
                for place, part in enumerate(found):
                    total = totals[place]
                    if part is not None:
                        totals[place] = part if total is None else total.add_(part)
        return (None, grad, *totals)


def _gradients(
    graph: _Graph, wanted: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    inputs = [graph.memory, *parameters]
    pairs = [
        (output, part)
        for output, part in zip(graph.outputs, wanted, strict=True)
        if part is not None and output.requires_grad
    ]
    if not pairs:
        return (None,) * len(inputs)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [output for output, _ in pairs], inputs, [part for _, part in pairs], allow_unused=True
    )
    return found


def _tensors(output: Any) -> list[Tensor]:
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in _tensors(part)]


def _filled(output: Any, tensors: Any) -> Any:
    """Put the tensors that autograd knows in the places of those that were computed.

    Returns:
        The output.
    """
    if output is None:
        return None
    if isinstance(output, Tensor):
        return next(tensors)
    parts = [_filled(part, tensors) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
