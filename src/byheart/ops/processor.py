"""What a processor is made for."""

import torch

__all__ = ["multiplies_bfloat16"]


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
