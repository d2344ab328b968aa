"""What the host knows of a tensor without waiting for a device.

To ask a device for a value, the host waits until all that it has started is done, and a compiled
step breaks there. So a step asks for values on the CPU alone, where asking is free; elsewhere it
does what is right for any value, and leaves what must hold to the device to check.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor


def values_are_known(tensor: Tensor) -> bool:
    """Say whether the host may ask for the values of a tensor.

    Args:
        tensor: On any device.

    Returns:
        `True` on the CPU, but for a step that is being compiled.
    """
    return tensor.is_cpu and not torch.compiler.is_compiling()


def known_none(mask: Bool[Tensor, "*shape"]) -> bool:
    """Say whether a mask is known to be nowhere `True`.

    Args:
        mask: Any mask.

    Returns:
        `False` also where it is not known.
    """
    return values_are_known(mask) and not bool(mask.any())


def require(holds: Bool[Tensor, "*shape"], error: Callable[[], Exception], elsewhere: str) -> None:
    """Refuse to go on unless something holds everywhere, without waiting for a device.

    Args:
        holds: What must be `True`.
        error: Makes the error where values are known.
        elsewhere: What must hold, for a device. It checks when its turn comes: a compiled step on
            the CPU raises a `RuntimeError` with this text, and CUDA stops the program with an
            assertion.
    """
    if not values_are_known(holds):
        torch._assert_async(holds.all(), elsewhere)
    elif not bool(holds.all()):
        raise error()
