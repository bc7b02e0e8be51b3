"""Turning parsed YAML values into the typed fields of nested dataclasses, or into one clear sentence."""

from __future__ import annotations

import functools
import keyword
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

REQUIRED = "???"
_MISSING_REMEDY = "is required and was not set; give it in the YAML file or on the command line"
_FLOAT_MAX = 1.7976931348623157e308
_INT_END = 2**63


def key_of(name: str) -> str:
    """The configuration key of a dataclass field: a key that Python reserves, as ``async``, has a field ``async_``."""
    bare = name.removesuffix("_")
    return bare if keyword.iskeyword(bare) else name


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved annotations of the fields of dataclass ``cls`` by configuration key, in field order."""
    hints = typing.get_type_hints(cls)
    return {key_of(item.name): hints[item.name] for item in fields(cls) if item.init}


def union_members(hint: Any) -> tuple[Any, ...]:
    """Members of ``hint`` without None: one for a plain type or Optional, more for a union."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def accepts_none(hint: Any) -> bool:
    """Whether null is a value of ``hint``."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return hint in (Any, None, type(None)) or (is_union and type(None) in typing.get_args(hint))


def nested_dataclass(hint: Any) -> type | None:
    """The dataclass that ``hint`` (or its Optional) names, or None."""
    members = union_members(hint)
    return members[0] if len(members) == 1 and isinstance(members[0], type) and is_dataclass(members[0]) else None


def type_name(hint: Any) -> str:
    """How ``hint`` reads in an error message or a table: ``int``, ``float or null``, ``one of 'a', 'b'``."""
    if accepts_none(hint) and hint is not Any:
        rest = [type_name(member) for member in union_members(hint) if member is not None]
        return " or ".join([*rest, "null"])
    if len(union_members(hint)) > 1:
        return " or ".join(type_name(member) for member in union_members(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in args)
    if origin in (tuple, list):
        inner = [type_name(arg) for arg in args if arg is not Ellipsis]
        if origin is list or Ellipsis in args:
            return f"list of {inner[0]}" if inner else "list"
        return f"list of {len(inner)} values ({', '.join(inner)})"
    if hint is dict or origin in (dict, Mapping):
        return "mapping"
    if hint is Any:
        return "any value"
    if isinstance(hint, type) and is_dataclass(hint):
        return "mapping"
    return {str: "string", bool: "true or false", Path: "path"}.get(hint, getattr(hint, "__name__", str(hint)))


def default_tree(cls: type) -> dict[str, Any]:
    """Defaults of ``cls`` as plain nested containers; fields without a default hold ``'???'``."""
    return {name: _default(field, hint) for field, (name, hint) in zip(_init_fields(cls), field_types(cls).items())}


def plain(value: Any) -> Any:
    """``value`` with dataclasses and mappings as dict, tuples as list, paths as str."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key_of(item.name): plain(getattr(value, item.name)) for item in _init_fields(type(value))}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type, values: Mapping[str, Any], key: str, origin: Callable[[str], str]) -> Any:
    """Construct dataclass ``cls`` from ``values`` (every key known).

    Args:
        key: full dotted key of this node, '' at the root.
        origin: gives for a full key the words that say where its value was set, such as `` (in run.yaml)``.

    Raises:
        ValueError: a value does not fit its field, a required one is missing, or the class refuses the values.
    """
    arguments = {}
    for name, hint in field_types(cls).items():
        full = join(key, name)
        if name in values:
            arguments[name] = convert(values[name], hint, full, origin)
    for item in _init_fields(cls):
        if key_of(item.name) not in arguments and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{join(key, key_of(item.name))} {_MISSING_REMEDY}")
    names = {key_of(item.name): item.name for item in _init_fields(cls)}
    try:
        return cls(**{names[name]: value for name, value in arguments.items()})
    except ValueError as error:
        text = str(error).removesuffix(".")
        named = (name for name in arguments if re.search(rf"\b{re.escape(name)}\b", text))
        blamed = next((name for name in named if origin(join(key, name))), None)
        where = origin(join(key, blamed)) if blamed else ""
        prefix = "" if not key or key in text else f"{key}: "
        raise ValueError(f"{prefix}{text}{where}") from error


def convert(value: Any, hint: Any, key: str, origin: Callable[[str], str]) -> Any:
    """``value`` as an instance of ``hint``. Integers fit float fields; nothing else is coerced.

    Raises:
        ValueError: it does not fit, naming ``key``, the expected type, the value and where it came from.
    """
    if value == REQUIRED and isinstance(value, str):
        raise ValueError(f"{key} {_MISSING_REMEDY}{origin(key)}")
    if hint is Any or (value is None and accepts_none(hint)):
        return value
    cls = nested_dataclass(hint)
    if cls is not None and isinstance(value, Mapping):
        return build(cls, value, key, origin)
    for member in union_members(hint):
        fitted = _fit(value, member, key, origin)
        if fitted is not _NO_FIT:
            return fitted
    raise ValueError(f"{key} must be {_article(type_name(hint))}, got {shown(value)}{origin(key)}")


def join(prefix: str, name: object) -> str:
    """Full dotted key of ``name`` below ``prefix``."""
    return f"{prefix}.{name}" if prefix else str(name)


def shown(value: Any) -> str:
    """``value`` for an error message: its repr, cut, with its YAML type."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {str: "string", dict: "mapping", list: "list"}
    return f"{text} ({names.get(type(value), type(value).__name__)})"


_NO_FIT = object()


def _fit(value: Any, hint: Any, key: str, origin: Callable[[str], str]) -> Any:
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Literal:
        return next((item for item in args if item == value and type(item) is type(value)), _NO_FIT)
    if kind in (tuple, list):
        return _fit_sequence(value, kind, args, key, origin)
    if kind is dict or kind is Mapping:
        return _fit_mapping(value, args, key, origin)
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and abs(value) <= _FLOAT_MAX else _NO_FIT
    if kind is Path:
        return Path(value) if isinstance(value, str) else _NO_FIT
    if isinstance(kind, type) and is_dataclass(kind):
        return _NO_FIT
    if kind is int and type(value) is int and abs(value) >= _INT_END:
        raise ValueError(f"{key} must be an integer of 64 bits, got {shown(value)}{origin(key)}")
    if kind in (int, str, bool):
        return value if type(value) is kind else _NO_FIT
    raise TypeError(f"field {key}: type {hint!r} is not supported in a configuration")


def _fit_sequence(value: Any, kind: type, args: tuple[Any, ...], key: str, origin: Callable[[str], str]) -> Any:
    if not isinstance(value, (list, tuple)):
        return _NO_FIT
    if kind is list or Ellipsis in args:
        hints = [args[0] if args else Any] * len(value)
    elif len(args) != len(value):
        return _NO_FIT
    else:
        hints = list(args)
    return kind(convert(item, hint, f"{key}[{index}]", origin) for index, (item, hint) in enumerate(zip(value, hints)))


def _fit_mapping(value: Any, args: tuple[Any, ...], key: str, origin: Callable[[str], str]) -> Any:
    if not isinstance(value, Mapping):
        return _NO_FIT
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{key} has the key {name!r}, which is not a string; quote it{origin(key)}")
    hint = args[1] if args else Any
    return {name: convert(item, hint, join(key, name), origin) for name, item in value.items()}


def _init_fields(cls: type) -> list[Field[Any]]:
    return [item for item in fields(cls) if item.init]


def _default(item: Field[Any], hint: Any) -> Any:
    if item.default is not MISSING:
        return plain(item.default)
    if item.default_factory is not MISSING:
        return plain(item.default_factory())
    cls = nested_dataclass(hint)
    return default_tree(cls) if cls is not None else REQUIRED


def _article(name: str) -> str:
    if name.startswith(("one of", "true", "any")):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name
