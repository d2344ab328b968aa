"""Identify a model by its weights."""

import hashlib
import json

import torch
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """Hash names, shapes and values of all parameters.

    A memory is only worth something to the weights that made it: saved states carry this hash.

    Returns:
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        header = json.dumps([name, list(parameter.shape), str(parameter.dtype)])
        digest.update(header.encode())
        flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
