"""Identify a model by its weights."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import nn


def model_fingerprint(
    model: nn.Module, leave_out: Callable[[str], bool] = lambda name: False
) -> str:
    """Hash names, shapes and values of all parameters.

    A memory is only worth something to the weights that made it: saved states carry this hash.

    Args:
        model: The model.
        leave_out: Names of parameters that do not count.

    Returns:
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if leave_out(name):
            continue
        header = json.dumps([name, list(parameter.shape), str(parameter.dtype)])
        digest.update(header.encode())
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
