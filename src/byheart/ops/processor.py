"""Whether a processor multiplies in bfloat16."""

from typing import Literal

import torch

__all__ = ["fast_precision", "multiplies_bfloat16"]


def fast_precision() -> Literal["float32", "bfloat16"]:
    """Choose in which precision this machine trains faster.

    Returns:
        "bfloat16" with a GPU, or a CPU that has the instruction.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones.

    Args:
        device: Where they are made.

    Returns:
        `False` for a CPU without the instruction, on which they take up to 50 times as long.
    """
    if device.type != "cpu":
        return True
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
