"""Fields that are one of a few words, numbers, or whole."""

import math
import operator
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

__all__ = ["require_choice", "require_choices", "require_finite", "require_whole"]


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


def require_whole(config: object) -> None:
    """Refuse a config in which something else stands for a whole number, or for true or false.

    Comparisons let 8.5 and "no" through, and what fails then is far from here.

    Args:
        config: An instance of a dataclass.

    Raises:
        TypeError: If there is such a value.
    """
    cls: type = type(config)
    for name, (kind, may_be_none) in _whole_fields_of(cls).items():
        value = getattr(config, name)
        if value is None and may_be_none:
            continue
        if kind is bool:
            fits, wanted = isinstance(value, bool), "True or False"
        elif kind is int:
            fits, wanted = _is_whole(value), "a whole number"
        else:
            fits = isinstance(value, (tuple, list)) and all(map(_is_whole, value))
            wanted = "a tuple of whole numbers"
        if not fits:
            msg = f"{name} must be {wanted}, got {value!r}."
            raise TypeError(msg)


def _is_whole(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


@cache
def _whole_fields_of(cls: type) -> Mapping[str, tuple[Any, bool]]:
    """Find the fields for whole numbers, tuples of them, and truth values.

    Returns:
        Their type and whether `None` will do, by name.
    """
    hints, found = typing.get_type_hints(cls), {}
    for field in fields(cls):
        hint = hints[field.name]
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
        if hint == tuple[int, ...] or kinds == [tuple[int, ...]]:
            kinds = [tuple]
        if len(kinds) == 1 and kinds[0] in (int, bool, tuple):
            found[field.name] = kinds[0], NoneType in get_args(hint)
    return found


@cache
def _choices_of(cls: type) -> Mapping[str, Sequence[Any]]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: get_args(hints[field.name])
        for field in fields(cls)
        if get_origin(hints[field.name]) is Literal
    }
