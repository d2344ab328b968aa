"""Whether kernels written in Triton can run on a device. The only way to them."""

import importlib
import warnings
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
_EIGHT_BITS = {torch.float8_e4m3fn: "float8e4nv", torch.float8_e5m2: "float8e5"}

# tensor cores that multiply bfloat16; an instruction that converts 8-bit numbers
_LEAST_CAPABILITY = (8, 0)
_EIGHT_BIT_CAPABILITY = (8, 9)


def import_kernels(name: str) -> ModuleType:
    """Import a module of kernels, and Triton with it.

    Args:
        name: Of a module of `byheart.ops`.

    Returns:
        The module.
    """
    return importlib.import_module(f"byheart.ops.{name}")


@cache
def _compiles_for(index: int) -> bool:
    try:
        kernels = import_kernels("search_kernels")
    except ImportError:
        return False
    device = torch.device("cuda", index)
    try:
        with torch.cuda.device(device):
            values = torch.zeros(1, 1, device=device)
            columns = torch.empty(1, 1, dtype=torch.int32, device=device)
            kernels.select_largest[(1,)](values, columns, columns, 1, 1, 1, 1, 16, 1, 1)
    # a compiler or driver that does not fit fails in many ways, which all mean the same
    except Exception as error:
        message = (
            f"Triton is installed but cannot compile for this GPU ({error}). The operators of "
            "PyTorch search instead, slower. Install a C compiler and the Triton that this torch "
            "asks for, or uninstall Triton."
        )
        warnings.warn(message, stacklevel=2)
        return False
    return True


def _works(index: int, stored: torch.dtype) -> bool:
    if torch.version.cuda is None:
        return False
    least = _EIGHT_BIT_CAPABILITY if stored in _EIGHT_BITS else _LEAST_CAPABILITY
    return torch.cuda.get_device_capability(index) >= least and _compiles_for(index)


# A trace takes the answer as it is: it depends on the machine alone. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler, and Triton with it.
_works._dynamo_marked_constant = True  # type: ignore[attr-defined]


def uses_kernels(tensor: Tensor, stored: torch.dtype) -> bool:
    """Say whether kernels can work beside this tensor.

    The first question about a device compiles and starts a small kernel on it.

    Args:
        tensor: On any device.
        stored: Type of the entries of the memory.

    Returns:
        `True` on a CUDA device that can multiply these entries, if Triton is installed and works.
    """
    if not tensor.is_cuda or stored not in (torch.float32, *HALF_DTYPES, *_EIGHT_BITS):
        return False
    return bool(_works(tensor.device.index or 0, stored))


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which kernels start.

    Args:
        tensor: On any device; nothing changes for the CPU.

    Returns:
        A context.
    """
    context: AbstractContextManager[Any] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context


def triton_dtype(dtype: torch.dtype) -> Any:
    """Name a type in Triton's terms.

    Args:
        dtype: A floating type of 8, 16 or 32 bits.

    Returns:
        Triton's type.
    """
    language = import_kernels("search_kernels").tl
    return getattr(language, _EIGHT_BITS.get(dtype, str(dtype).removeprefix("torch.")))


def without_eight_bits(entries: Tensor) -> Tensor:
    """View 8-bit floating numbers as integers: kernels can then load them with a default.

    Args:
        entries: Keys or values of any type.

    Returns:
        The same memory.
    """
    return entries.view(torch.uint8) if entries.dtype in _EIGHT_BITS else entries


def power_of_two(number: int, least: int) -> int:
    """Round up to a power of two, the only lengths that kernels know.

    Args:
        number: At least 1.
        least: A power of two.

    Returns:
        The smallest power of two that is neither below `number` nor `least`.
    """
    return max(least, 1 << (number - 1).bit_length())
