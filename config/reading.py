"""Reads nested dicts into nested dataclasses, strictly: an unknown key, a wrong type or a missing
value is one line that names the key, the value and the nearest valid choice."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

import yaml


class UserError(Exception):
    """Something that the user can mend; commands print it as one line and exit with this code."""
    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a wrong type, or an impossible value."""


def apply_override(tree: dict, word: str) -> dict:
    """`tree` with one `section.key=value` word applied; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r}: overrides are written section.key=value")
    try:
        value = yaml.safe_load(text)
    except Exception:  # PyYAML lets ValueError, KeyError, RecursionError and others through
        raise ConfigError(f"{key}: {text[:80]!r} is not a YAML value") from None
    *parents, leaf = key.split(".")
    tree = dict(tree)
    node = tree
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    node[leaf] = value
    return tree


def build(cls: type, tree: Any, path: str = "", root: type | None = None) -> Any:
    """An instance of dataclass `cls` from the mapping `tree`; `path` names it in errors, `root` the whole schema."""
    root = root or cls
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys below it, got {tree!r}")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    dotted = f"{path}." if path else ""
    for key in tree:
        if key not in fields:
            shown = key if str(key).isprintable() else repr(key)
            raise ConfigError(f"{dotted}{shown}: unknown key; did you mean {_nearest(f'{dotted}{key}', dotted, fields, root)}?")
    required = [name for name, f in fields.items()
                if f.default is f.default_factory is dataclasses.MISSING and name not in tree]
    if required:
        raise ConfigError(f"{dotted}{required[0]}: required, and not set; add {dotted}{required[0]}")
    return cls(**{key: _coerce(hints[key], value, f"{dotted}{key}", root) for key, value in tree.items()})


def _coerce(hint: Any, value: Any, path: str, root: type) -> Any:
    """`value` as the type `hint`; numbers may be written as strings, since PyYAML reads 3e-4 as one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not types.NoneType]
        return None if value is None else _coerce(options[0], value, path, root)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path, root)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(choices)}"
                          + (f"; did you mean {near[0]}?" if near else ""))
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list such as [a, b], got {value!r}")
        return [_coerce(typing.get_args(hint)[0], item, f"{path}[{i}]", root) for i, item in enumerate(value)]
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = int(value) if isinstance(value, int) else float(value)
            if math.isfinite(number) and (hint is float or number == int(number)):
                return hint(number)
        except (ValueError, OverflowError):
            pass
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    article = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[hint]
    raise ConfigError(f"{path}: expected {article}, got {value!r}")


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below dataclass `cls`, sections included."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                found += _keys(option, f"{prefix}{name}.")
    return found


def _nearest(key: str, dotted: str, fields: dict, root: type) -> str:
    """The valid key most like `key`: the same leaf in another section, a near leaf here, then anything."""
    every, leaf = _keys(root), key.rsplit(".", 1)[-1]
    elsewhere = [k for k in every if k.rsplit(".", 1)[-1] == leaf]
    here = [dotted + k for k in difflib.get_close_matches(leaf, fields, n=1, cutoff=0.6)]
    return (elsewhere or here or difflib.get_close_matches(key, every, n=1, cutoff=0.0))[0]


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
