"""A configuration as text: YAML that loads back to the same values, dotted keys, and the table of every field."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from spear_megatron.config.convert import (
    REQUIRED,
    default_tree,
    field_types,
    join,
    key_of,
    nested_dataclass,
    plain,
    type_name,
)


class FieldRow(NamedTuple):
    """One line of the reference: full key, type in words, default as YAML, and what the field does."""

    key: str
    type: str
    default: str
    doc: str


def to_yaml(instance: Any) -> str:
    """The resolved configuration as YAML. ``load(type(instance), file)`` of it gives an equal instance."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(plain(instance))))


def flatten(instance: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its full dotted key, in declaration order. Mappings and sequences are values, not sections."""
    flat: dict[str, Any] = {}
    for item in fields(instance):
        value, key = getattr(instance, item.name), join(prefix, key_of(item.name))
        if is_dataclass(value) and not isinstance(value, type):
            flat.update(flatten(value, key))
        else:
            flat[key] = value
    return flat


def field_table(root: type) -> list[FieldRow]:
    """Every leaf field below the dataclass ``root``, in declaration order, with its documentation."""
    return _rows(root, default_tree(root), "")


def field_docs(cls: type) -> dict[str, str]:
    """Documentation of each field by its key: the string literal right after the field in the class body, or else its
    entry in the ``Attributes:`` section of the class docstring.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        node = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(node, ast.ClassDef)
        docs.update(_attributes_section(ast.get_docstring(node) or "", [key_of(item.name) for item in fields(base)]))
        for statement, following in zip(node.body, node.body[1:]):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[key_of(statement.target.id)] = " ".join(str(following.value.value).split())
    return docs


def _attributes_section(docstring: str, names: list[str]) -> dict[str, str]:
    """Entries ``name: text`` of a Google-style section; ``a, b: text`` documents several fields."""
    lines = docstring.partition("Attributes:\n")[2].splitlines()
    section = itertools.takewhile(lambda line: not line or line.startswith(" "), lines)
    text = " ".join(" ".join(section).split())
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    heads = list(re.finditer(rf"(?:^|(?<=\s))((?:{one})(?:, (?:{one}))*): ", text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {name: text[head.end() : end].strip() for head, end in zip(heads, ends) for name in head[1].split(", ")}


def _rows(cls: type, defaults: Mapping[str, Any], prefix: str) -> list[FieldRow]:
    rows, docs = [], field_docs(cls)
    for name, hint in field_types(cls).items():
        key, nested, default = join(prefix, name), nested_dataclass(hint), defaults.get(name)
        if nested is not None:
            if default is None:
                rows.append(FieldRow(key, "section or null", "null", docs.get(name, "")))
            rows += _rows(nested, default if isinstance(default, Mapping) else default_tree(nested), key)
        else:
            rows.append(FieldRow(key, type_name(hint), _shown_default(default), docs.get(name, "")))
    return rows


def _shown_default(value: Any) -> str:
    if value == REQUIRED:
        return "required"
    text = OmegaConf.to_yaml(OmegaConf.create({"v": _escaped(value)})).removeprefix("v:").strip()
    if isinstance(value, (list, dict)) and value:
        return str(value)
    return text.removesuffix("\n...").strip()


def _escaped(value: Any) -> Any:
    """Strings with ``${`` escaped, so that a value that was resolved once is not resolved again."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
