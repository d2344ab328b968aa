"""Configs: frozen dataclasses, and their way to and from JSON and the command line.

A config is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, string enums,
`Literal`, tuples, other configs, and unions of these. An optional feature is an optional
sub-config: `None` means off. Each class stands next to what it configures; here are only the
conversions, which check every value and name the offending key by its dotted path.
"""

import difflib
import enum
import json
import math
import os
import secrets
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

from byheart.choices import require_choice

__all__ = [
    "apply_overrides",
    "from_dict",
    "load_config",
    "save_config",
    "to_dict",
    "write_text_atomic",
]

ConfigT = TypeVar("ConfigT")

_REMEDIES: dict[object, str] = {
    bool: "Write true or false.",
    int: "Write a whole number.",
    float: "Write a number.",
    str: "Write a string.",
}
# JSON has no word for these, so they travel as strings.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_dict(config: object) -> dict[str, object]:
    """Turn a config into nested dictionaries, lists and scalars that JSON can hold.

    Every field appears, defaults too, so that the result describes a run completely. Tuples
    become lists, enums their values, and non-finite floats the strings `inf`, `-inf` and `nan`.

    Args:
        config: An instance of a config dataclass.

    Returns:
        A dictionary for which `from_dict(type(config), ...)` gives an equal config.

    Raises:
        TypeError: If `config` is no dataclass instance or holds a value JSON cannot express.
    """
    if not is_dataclass(config) or isinstance(config, type):
        msg = f"config must be an instance of a dataclass, got {type(config).__name__}."
        raise TypeError(msg)
    plain = _to_plain(config, "")
    assert isinstance(plain, dict)
    return plain


def from_dict(cls: type[ConfigT], mapping: Mapping[str, object]) -> ConfigT:
    """Build a config from nested dictionaries, checking each key and each value.

    Args:
        cls: The config dataclass.
        mapping: Values by field name, as `to_dict` or a JSON file gives them. Fields with a
            default may be missing.

    Returns:
        The config, with all sub-configs built.

    Raises:
        TypeError: If a value has the wrong type; the message names its dotted path.
        ValueError: If a key is unknown or a required one missing, if a value is not among the
            choices, or if the dataclass refuses its values.
    """
    config = _build(cls, mapping, "")
    assert isinstance(config, cls)
    return config


def apply_overrides(config: ConfigT, overrides: Iterable[str]) -> ConfigT:
    """Replace single values of a config, as the command line's `--set a.b=c` does.

    The value is read as JSON, and as a plain string where JSON or the field's type does not fit:
    `lr=3e-4`, `layers=[3, 7]`, `name=run 5`. `null` turns an optional sub-config off, a JSON
    object turns it on. Values are checked together, after the last override.

    Args:
        config: The config to start from; it is not changed.
        overrides: Settings `dotted.path=value`; a later one wins.

    Returns:
        The changed config.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a setting has no `=`, an unknown key, or reaches into a sub-config that is
            off, or if the dataclass refuses its values.
    """
    tree = to_dict(config)
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key.strip():
            msg = f"An override must have the form key=value, got {override!r}."
            raise ValueError(msg)
        _override(type(config), tree, key.strip(), raw.strip())
    return from_dict(type(config), tree)


def save_config(config: object, path: str | os.PathLike[str]) -> None:
    """Write a config as JSON. An interrupted write leaves the file as it was.

    Args:
        config: An instance of a config dataclass.
        path: The file to write; its folder must exist.
    """
    text = json.dumps(to_dict(config), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def load_config(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
    """Read a config that `save_config` or a person wrote.

    Args:
        cls: The config dataclass.
        path: A JSON file.

    Returns:
        The config.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If the file is not JSON, or for the reasons `from_dict` gives.
    """
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as err:
        msg = f"{os.fspath(path)} must be a JSON file: {err}. Correct it, or save the config again."
        raise ValueError(msg) from err
    if not isinstance(mapping, dict):
        msg = f"{os.fspath(path)} must hold a JSON object, got {type(mapping).__name__}."
        raise TypeError(msg)
    return from_dict(cls, mapping)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file so that at every moment the path holds the old text or the new one.

    Args:
        path: The file to write; its folder must exist.
        text: The content; line ends are written as they are.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _to_plain(value: object, path: str) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _to_plain(getattr(value, f.name), _join(path, f.name))
            for f in _init_fields(type(value))
        }
    if isinstance(value, enum.Enum):
        return _to_plain(value.value, path)
    if isinstance(value, (tuple, list)):
        return [_to_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    msg = (
        f"{path} must be a value that JSON can hold, got {type(value).__name__}. "
        "Use numbers, strings, tuples, enums and nested configs."
    )
    raise TypeError(msg)


def _build(cls: type, mapping: object, path: str) -> object:
    if not isinstance(mapping, Mapping):
        raise _wrong_type(path or cls.__name__, f"a mapping for {cls.__name__}", mapping)
    annotations = _field_types(cls)
    for key in mapping:
        if key not in annotations:
            raise _unknown_key(_join(path, str(key)), [_join(path, name) for name in annotations])
    missing = [name for name in _required_fields(cls) if name not in mapping]
    if missing:
        names = ", ".join(_join(path, name) for name in missing)
        msg = f"{cls.__name__} needs a value for {names}, got none. Add it to the config."
        raise ValueError(msg)
    values = {
        name: _convert(annotations[name], value, _join(path, name))
        for name, value in mapping.items()
    }
    try:
        return cls(**values)
    except ValueError as err:
        if not path:
            raise
        msg = f"{path}: {err}"
        raise ValueError(msg) from err


def _convert(annotation: Any, value: object, path: str) -> object:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, path)
    if origin is Literal:
        return _convert_literal(get_args(annotation), value, path)
    if origin is tuple:
        return _convert_tuple(get_args(annotation), value, path)
    if _is_config(annotation):
        return value if isinstance(value, annotation) else _build(annotation, value, path)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        plain = value.value if isinstance(value, enum.Enum) else value
        return annotation(_convert_literal([member.value for member in annotation], plain, path))
    return _convert_scalar(annotation, value, path)


def _convert_scalar(annotation: Any, value: object, path: str) -> object:
    if annotation is float and not isinstance(value, bool):
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, (int, float)):
            return float(value)
    # bool is a subclass of int, but `num_layers: true` is a mistake
    elif annotation in (bool, int, str) and type(value) is annotation:
        return value
    elif annotation is types.NoneType and value is None:
        return None
    if annotation in _REMEDIES or annotation is types.NoneType:
        raise _wrong_type(path, annotation.__name__, value, _REMEDIES.get(annotation, ""))
    msg = f"{path} has the type {annotation}, which configs do not support."
    raise TypeError(msg)


def _convert_union(annotation: Any, value: object, path: str) -> object:
    members = [m for m in get_args(annotation) if m is not types.NoneType]
    if value is None and types.NoneType in get_args(annotation):
        return None
    if len(members) == 1:
        return _convert(members[0], value, path)
    config = _config_in(annotation)
    if config is not None and isinstance(value, Mapping):
        return _convert(config, value, path)
    for member in members:
        converted, refusal = _attempt(member, value, path)
        if refusal is None:
            return converted
    names = [m.__name__ if isinstance(m, type) else str(m).removeprefix("typing.") for m in members]
    raise _wrong_type(path, " | ".join(names), value)


def _convert_literal(choices: Sequence[object], value: object, path: str) -> object:
    require_choice(path, value, choices)
    return value


def _convert_tuple(item_types: tuple[Any, ...], value: object, path: str) -> object:
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(path, "a list", value, "Write it in brackets, as in [3, 7].")
    if len(item_types) == 2 and item_types[1] is Ellipsis:
        item_types = (item_types[0],) * len(value)
    if len(item_types) != len(value):
        msg = f"{path} must have {len(item_types)} values, got {len(value)}."
        raise ValueError(msg)
    pairs = zip(item_types, value, strict=True)
    return tuple(_convert(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))


def _override(root: type, tree: dict[str, object], key: str, raw: str) -> None:
    cls, node, path = root, tree, ""
    *outer, last = key.split(".")
    for part in outer:
        parent, path = path, _join(path, part)
        annotation = _annotation(cls, part, parent, root, key)
        child, below = _config_in(annotation), node[part]
        if child is None:
            msg = f"{path} is a single value, so {key} cannot be set. Set {path} itself."
            raise ValueError(msg)
        if not isinstance(below, dict):
            required = ", ".join(f'"{name}": ...' for name in _required_fields(child))
            msg = (
                f"{path} is off (null), so {key} cannot be set. "
                f"Turn it on first: {path}={{{required}}}."
            )
            # off is no wrong type
            raise ValueError(msg)  # noqa: TRY004
        cls, node = child, below
    annotation = _annotation(cls, last, path, root, key)
    node[last] = _to_plain(_parse(annotation, raw, key), key)


def _annotation(cls: type, name: str, path: str, root: type, key: str) -> Any:
    annotations = _field_types(cls)
    if name not in annotations:
        # a setting of another level is the likelier slip, so look for the whole key first
        known = _dotted_names(root)
        inner = [dotted for dotted in known if dotted.endswith(f".{key}")]
        raise _unknown_key(_join(path, name), inner or known, exact=bool(inner))
    return annotations[name]


def _parse(annotation: Any, raw: str, path: str) -> object:
    # JSON where it fits the type, else the bare string
    candidates: list[object] = [raw]
    try:
        value = json.loads(raw)
    except ValueError:
        pass
    else:
        candidates.insert(0, value)
        if isinstance(value, float) and value.is_integer():
            candidates.append(int(value))  # steps=1e5
    refusals = []
    for candidate in candidates:
        converted, refusal = _attempt(annotation, candidate, path)
        if refusal is None:
            return converted
        refusals.append(refusal)
    raise refusals[0]


def _attempt(annotation: Any, value: object, path: str) -> tuple[object, Exception | None]:
    try:
        return _convert(annotation, value, path), None
    except (TypeError, ValueError) as err:
        return None, err


@cache
def _field_types(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in _init_fields(cls)}


def _init_fields(cls: type) -> list["Field[Any]"]:
    return [f for f in fields(cls) if f.init]


def _required_fields(cls: type) -> list[str]:
    return [
        f.name for f in _init_fields(cls) if f.default is MISSING and f.default_factory is MISSING
    ]


def _is_config(annotation: object) -> TypeGuard[type]:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _config_in(annotation: Any) -> type | None:
    # of a union of several configs no key could tell which one is meant
    configs = [member for member in (annotation, *get_args(annotation)) if _is_config(member)]
    return configs[0] if len(configs) == 1 else None


def _dotted_names(cls: type, path: str = "") -> list[str]:
    names = []
    for name, annotation in _field_types(cls).items():
        names.append(_join(path, name))
        child = _config_in(annotation)
        if child is not None:
            names.extend(_dotted_names(child, _join(path, name)))
    return names


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong_type(path: str, expected: str, value: object, remedy: str = "") -> TypeError:
    met = f"{value!r} ({type(value).__name__})"
    return TypeError(f"{path} must be {expected}, got {met}. {remedy}".rstrip())


def _unknown_key(path: str, known: Sequence[str], *, exact: bool = False) -> ValueError:
    near = known if exact else difflib.get_close_matches(path, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
    return ValueError(f"{path} is not a known setting. {remedy}")
