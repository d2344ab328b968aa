"""Refuse to wait for a device: contexts for tests of steps that must only queue work."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NeverWaits", "gpu_never_waits"]


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses, on any device, operators whose result the host would have to wait for on a GPU.

    It does not see `tolist` and indexing by masks, which devices without values (`meta`) refuse.
    """

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator.

        Args:
            func: The operator.
            types: Of its tensors.
            args: Its arguments.
            kwargs: Its named arguments.

        Returns:
            What it returns.

        Raises:
            RuntimeError: If it waits.
        """
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.NAMES:
            msg = f"{func.name()} waits for the device."
            raise RuntimeError(msg)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu_never_waits() -> Iterator[None]:
    """Let PyTorch refuse what waits for a GPU, as far as it notices.

    Yields:
        Nothing.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
