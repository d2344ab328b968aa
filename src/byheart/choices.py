"""Fields that are one of a few words, and fields that are numbers."""

import math
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

__all__ = ["require_choice", "require_choices", "require_finite"]


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


def require_finite(config: object, *, but: Collection[str] = (), path: str = "") -> None:
    """Refuse a config in which a number is NaN or infinite, in sub-configs too.

    Bounds let NaN through, which is neither below nor above them.

    Args:
        config: An instance of a dataclass.
        but: Names of fields in which infinity means something; their config refuses NaN.
        path: Dotted name of the config, for the message.

    Raises:
        ValueError: If there is such a number.
    """
    cls: type = type(config)
    for field in fields(cls):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            require_finite(value, but=but, path=f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value) and field.name not in but:
            msg = f"{name} must be a finite number, got {value}. Write one."
            raise ValueError(msg)


@cache
def _choices_of(cls: type) -> Mapping[str, Sequence[Any]]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: get_args(hints[field.name])
        for field in fields(cls)
        if get_origin(hints[field.name]) is Literal
    }
