"""Fields that are one of a few words."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin

__all__ = ["require_choice", "require_choices"]


def require_choices(config: object) -> None:
    """Refuse a config of whose `Literal` fields one has another value.

    Nothing else would notice a misspelled word: code asks for one and takes the rest for the other.

    Args:
        config: An instance of a dataclass.

    Raises:
        ValueError: If a value is not among the choices.
    """
    cls: type = type(config)
    for name, choices in _choices_of(cls).items():
        require_choice(name, getattr(config, name), choices)


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: What has the value.
        value: The value.
        choices: What it may be.

    Raises:
        ValueError: If it is nothing of this.
    """
    # 1 == True in Python
    if not any(type(choice) is type(value) and choice == value for choice in choices):
        names = ", ".join(repr(choice) for choice in choices)
        msg = f"{name} must be one of {names}, got {value!r}."
        raise ValueError(msg)


@cache
def _choices_of(cls: type) -> Mapping[str, Sequence[Any]]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: get_args(hints[field.name])
        for field in fields(cls)
        if get_origin(hints[field.name]) is Literal
    }
