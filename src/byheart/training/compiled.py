"""Compile the steps of a run, and say which runs cannot be compiled."""

from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch

from byheart.memory.dense import DenseStore
from byheart.memory.layout import MemoryLayout
from byheart.memory.state import MemoryState
from byheart.training.config import Compile

__all__ = ["compiled", "keep_addresses", "require_compilable"]

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function, mode: Compile) -> Function:
    """Compile a part of a step, in one piece and for one shape.

    Args:
        function: What every step calls.
        mode: How; "no" for not at all.

    Returns:
        A function that does the same. It compiles when it is first called.
    """
    if mode == "no":
        return function
    made = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    return cast("Function", made)


def keep_addresses(states: Iterable[MemoryState], mode: Compile) -> None:
    """Promise CUDA graphs that the rings stay where they are: they would be copied in every step.

    Args:
        states: The memory of a run.
        mode: How its steps are compiled.
    """
    if mode != "reduce-overhead":
        return
    for state in states:
        for store in state.stores.values():
            assert isinstance(store, DenseStore)
            for side in (store.keys, store.values):
                torch._dynamo.mark_static_address(side, guard=False)


def require_compilable(layout: MemoryLayout, mode: Compile) -> None:
    """Refuse to compile steps of a store that is not made of tensors.

    Args:
        layout: The layout of the model.
        mode: How its steps are to be compiled.

    Raises:
        ValueError: If the store cannot be compiled.
    """
    knn = layout.knn_memory
    if mode != "no" and knn is not None and knn.store != "dense":
        msg = (
            f"training.compile={mode!r} needs a memory with store='dense', got {knn.store!r}. Use "
            "that store, or compile='no'."
        )
        raise ValueError(msg)
