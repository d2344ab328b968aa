"""Test any memory store against a plain list of pairs."""

import unittest
from collections.abc import Callable
from typing import Any, cast

from byheart.memory.store import MemoryStore

MakeStore = Callable[[int, int, int, int], MemoryStore]
"""Makes an empty store from batch size, key-value heads, memory size and head width."""


def store_contract(
    make_store: MakeStore, *, exact: bool = True, minimum_recall: float = 1.0
) -> type[unittest.TestCase]:
    """Make a test case that checks a store against the contract of `MemoryStore`.

    Random sequences of calls (writes of any length with any mask, resets, copies, saving and
    loading) run on the store and on a Python list of pairs per row; after each call both must agree
    about every entry and every search. A failure is reduced to the shortest sequence that shows
    it, which may take a minute. Keys are multiples of 1/64 that all usual float formats hold
    exactly, so that an exact store has no excuse of rounding:

        TestMyStore = store_contract(lambda *shape: MyStore(*shape))

    Args:
        make_store: Makes an empty store.
        exact: Whether a search must find the best entries. If not, it may miss some.
        minimum_recall: Share of the best `top_k` entries that each search must find, averaged over
            its queries, if the store is not exact.

    Returns:
        A test case for unittest or pytest; bind it to a name at the top level of a test module.

    Raises:
        ImportError: If hypothesis is not installed.
        ValueError: If `minimum_recall` is out of range, or below 1 for an exact store.
    """
    if not 0 <= minimum_recall <= 1:
        msg = f"minimum_recall must be between 0 and 1, got {minimum_recall}."
        raise ValueError(msg)
    if exact and minimum_recall != 1:
        msg = (
            f"minimum_recall must be 1 for an exact store, got {minimum_recall}. Pass exact=False."
        )
        raise ValueError(msg)
    try:
        import hypothesis
    except ImportError as error:
        msg = "byheart.testing.store_contract needs the hypothesis package: pip install hypothesis."
        raise ImportError(msg) from error
    from byheart.testing.store_machine import StoreMachine

    attributes = {
        "make_store": staticmethod(make_store),
        "exact": exact,
        "minimum_recall": minimum_recall,
    }
    machine: Any = type("StoreContract", (StoreMachine,), attributes)
    case: Any = machine.TestCase
    case.settings = hypothesis.settings(max_examples=40, stateful_step_count=20, deadline=None)
    return cast("type[unittest.TestCase]", case)
