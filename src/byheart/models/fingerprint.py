"""Identify a model by its weights."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

# words of a row, when the bits of a weight are added up
_WIDTH = 4096


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


def weight_sums(
    model: nn.Module, leave_out: Callable[[str], bool] = lambda name: False
) -> dict[str, list[int] | list[float]]:
    """Add up the bits of all parameters, to see later whether one has changed.

    Several times faster than a fingerprint, and on the device. A tensor's count of writes would
    cost nothing, but misses those through `.data`, and starts anew in a copy.

    Args:
        model: The model.
        leave_out: Names of parameters that do not count.

    Returns:
        Sums by name. Those of a weight that has changed in one place always differ; in several, all
        but always. Those of weights whose bits are not at hand, such as shards, are equal to none.
    """
    return {
        # each a number of its own: lists compare by identity first
        name: _sums(weight).tolist() if type(weight) is Tensor else [float("nan")]
        for name, parameter in model.named_parameters()
        for weight in (parameter.detach(),)
        # weights that were moved out of memory have no bits to add
        if not (leave_out(name) or weight.is_meta)
    }


def _sums(weight: Tensor) -> Tensor:
    """Add up 64-bit words, as columns and as rows of `_WIDTH`, each with an odd factor.

    Sums wrap around, where odd factors lose nothing; they see words that change places.

    Returns:
        Both sums.
    """
    flat = weight.contiguous().view(-1).view(torch.uint8)
    count = len(flat) // 8
    words = flat[: 8 * count]
    # a weight may begin anywhere in its storage, a word may not
    words = (words.clone() if words.storage_offset() % 8 else words).view(torch.int64)
    rows = words[: count // _WIDTH * _WIDTH].view(-1, _WIDTH)
    last = torch.cat([words[rows.numel() :], flat[8 * count :].long()])
    factors = torch.arange(1, 2 * (_WIDTH + 8 + len(rows)), 2, device=weight.device)
    columns = torch.nn.functional.pad(rows.sum(0), (0, 8))
    columns[: len(last)] += last
    return torch.stack(
        [(columns * factors[: len(columns)]).sum(), (rows.sum(1) * factors[: len(rows)]).sum()]
    )
