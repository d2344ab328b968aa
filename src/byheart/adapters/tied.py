"""Tied weights in checkpoints of a wrapped model."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def keep_tied_weights_once(module: nn.Module) -> None:
    """Write tied weights once, and find them again when they are loaded.

    Files of safetensors, which the Hugging Face Trainer writes, may not hold a tensor under two
    names. Hugging Face's own models see to that themselves, but not inside another module.

    Args:
        module: The module whose `state_dict` and `load_state_dict` are to do so.
    """
    module.register_state_dict_post_hook(_drop_aliases)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_restore_aliases)  # type: ignore[no-untyped-call]


def _aliases(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Find the names of parameters that are also known by another name.

    Yields:
        Each such name, and the first name of the same parameter.
    """
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            yield name, known


def _drop_aliases(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: Any
) -> None:
    for name, _ in _aliases(module):
        state_dict.pop(prefix + name, None)


def _restore_aliases(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    for name, known in _aliases(module):
        if prefix + known in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + known])
