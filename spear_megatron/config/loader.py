"""Loading a configuration: defaults from nested dataclasses, a YAML file that only overrides them, ``key=value`` pairs.

A YAML file may name a parent with ``base: other.yaml`` (relative to itself), or several, of which later ones win.
Values may refer to others as ``${a.b}``.
Every problem is one ValueError (FileNotFoundError for a missing file) naming the key and the file or override.
"""

from __future__ import annotations

import difflib
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spear_megatron.config.convert import build, default_tree, field_types, join, nested_dataclass, union_members

T = TypeVar("T")
BASE_KEY = "base"


@dataclass(frozen=True, slots=True)
class _Layer:
    """One source of values: ``origin`` says in words where they came from."""

    values: Mapping[str, Any]
    origin: str


def load(root: type[T], yaml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Compose an instance of the dataclass ``root``.

    Args:
        root: nested frozen dataclasses; every field is a scalar, Optional, Literal, tuple, list, mapping or dataclass.
        yaml_path: a file whose keys override the defaults, or None.
        overrides: ``a.b=value`` strings with the value in YAML syntax, applied in order after the file.

    Raises:
        FileNotFoundError: the file or its ``base`` does not exist.
        ValueError: unknown key, wrong type, bad YAML or interpolation, or values that a dataclass refuses.
    """
    files = _file_layers(Path(yaml_path), ()) if yaml_path is not None else []
    given = [_override_layer(root, text) for text in overrides]
    layers = [*files, *given]
    origins: dict[str, str] = {}
    for layer in layers:
        for key in _walk(root, layer):
            origins[key] = layer.origin

    def origin(key: str) -> str:
        while key and key not in origins:
            key = key.rpartition(".")[0]
        return f" ({origins[key]})" if key else ""

    together: Mapping[str, Any] = functools.reduce(_merged, (layer.values for layer in given), {})
    values = functools.reduce(_overlay, [*(layer.values for layer in files), together], default_tree(root))
    instance: T = build(root, _resolve(values, origin), "", origin)
    return instance


def valid_keys(root: type) -> list[str]:
    """Full dotted keys of every field below ``root``, sections included, in declaration order."""
    keys = []
    for name, hint in field_types(root).items():
        keys.append(name)
        cls = nested_dataclass(hint)
        if cls is not None:
            keys += [join(name, key) for key in valid_keys(cls)]
    return keys


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The valid key that ``key`` most likely meant: same last part first, then the most similar text."""
    last = key.rpartition(".")[2]

    def closeness(candidate: str) -> tuple[float, float]:
        name = candidate.rpartition(".")[2]
        local = difflib.SequenceMatcher(None, last, name).ratio()
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return (2.0 if local == 1.0 else local + whole, whole)

    return max(keys, key=closeness, default=None)


def _file_layers(path: Path, children: tuple[Path, ...]) -> list[_Layer]:
    """Layers of ``path`` and its ancestors, the oldest first. ``children`` are the files that led here."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a YAML file")
    if not path.is_file():
        reason = f", named as '{BASE_KEY}' in {children[-1]}" if children else ""
        raise FileNotFoundError(f"configuration file {path} does not exist{reason}")
    if path.resolve() in children:
        raise ValueError(f"{path}: '{BASE_KEY}' leads back to this file; remove the circle")
    values = _parse_file(path)
    bases = values.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{BASE_KEY} must be the path of a YAML file, or a list of paths, got {bases!r} (in {path})")
    layers = [layer for base in bases for layer in _file_layers(path.parent / base, (*children, path.resolve()))]
    return [*layers, _Layer(values, f"in {path}")]


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    try:
        config = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_yaml_problem(error, text)}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} must hold a mapping of keys to values, not a single value") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be a configuration") from error
    except ValueError as error:  # a number or a date that Python cannot hold
        raise ValueError(f"{path} holds a value that cannot be read: {_first_line(error)}") from error
    values = OmegaConf.to_container(config, resolve=False)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, not a list")
    return {str(key): value for key, value in values.items()}


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or _first_line(error))
    if mark is None:
        return problem
    lines = text.splitlines() or [""]
    line = lines[min(mark.line, len(lines) - 1)].strip()
    return f"{problem}, line {mark.line + 1}: {line[:120]!r}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _override_layer(root: type, text: str) -> _Layer:
    origin = f"in the override {text!r}"
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"override {text!r} must have the form key=value, such as trainer.seed=1")
    value: Any
    try:
        config = OmegaConf.from_dotlist([f"value={raw}"])
        value = OmegaConf.to_container(config, resolve=False)["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, raw)
        raise ValueError(f"{key}: the value of override {text!r} is not valid YAML: {problem}") from error
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ValueError(f"{key}: the value of override {text!r} cannot be read: {_first_line(error)}") from error
    if _takes_raw_text(root, key, value, raw):
        value = raw.strip()
    elif value is None and not raw.strip():  # most often a variable of the shell that is not set
        raise ValueError(f"{key} is given no value in the override {text!r}: write {key}=null to unset it")
    for part in reversed(key.split(".")):
        value = {part: value}
    return _Layer(value, origin)


def _takes_raw_text(root: type, key: str, value: Any, raw: str) -> bool:
    """A string field keeps ``001`` or ``yes`` as typed: quoting twice for the shell is no fun."""
    node: type | None = root
    hint: Any = None
    for part in key.split("."):
        hint = field_types(node).get(part) if node is not None else None
        node = nested_dataclass(hint)
    only_text = all(member is str or _is_text_literal(member) for member in union_members(hint))
    empty = value is None and not raw.strip()
    return only_text and (empty or isinstance(value, (bool, int, float)))


def _is_text_literal(hint: Any) -> bool:
    arguments = getattr(hint, "__args__", ())
    return bool(arguments) and all(isinstance(value, str) for value in arguments)


def _walk(root: type, layer: _Layer) -> list[str]:
    """Every full key that ``layer`` sets, sections included. Raises ValueError at the first unknown one."""
    found: list[str] = []

    def visit(cls: type, values: Mapping[Any, Any], prefix: str) -> None:
        hints = field_types(cls)
        for name, value in values.items():
            key = join(prefix, name)
            if name not in hints:
                near = nearest_key(key, valid_keys(root))
                raise ValueError(f"unknown key {key!r} {layer.origin}; did you mean {near!r}?")
            found.append(key)
            nested = nested_dataclass(hints[name])
            if nested is not None and isinstance(value, Mapping):
                visit(nested, value, key)

    visit(root, layer.values, "")
    return found


def _resolve(values: dict[str, Any], origin: Callable[[str], str]) -> dict[str, Any]:
    """``values`` with every ``${...}`` replaced, as plain containers."""
    if not _has_interpolation(values):  # resolving walks every node, which is most of the time of a load
        return values
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ValueError(f"{key or 'a value'} cannot be resolved: {_first_line(error)}{origin(key)}") from error
    except RecursionError as error:
        raise ValueError("a value refers to itself through ${...}; remove the circle") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_interpolation, value.values()))
    if isinstance(value, list):
        return any(map(_has_interpolation, value))
    return isinstance(value, str) and "${" in value


def _overlay(under: Any, over: Any) -> Any:
    """As :func:`_merged`, but a section that names another class by ``name`` starts without the arguments (``kwargs``)
    of the one before. Overrides are one layer, in whatever order they name both.
    """
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    if "kwargs" in under and "name" in over and over["name"] != under.get("name"):
        under = {**under, "kwargs": {}}
    return {**under, **{key: _overlay(under.get(key), value) for key, value in over.items()}}


def _merged(under: Any, over: Any) -> Any:
    """Mappings merge key by key; anything else replaces what was there."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}
