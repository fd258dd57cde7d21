"""Reads YAML and nested dicts into nested dataclasses, strictly: an unknown key, a key written twice, a wrong type, a value out
of bounds or a missing one is one line that names the key, the value and the nearest valid choice."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import os
import re
import reprlib
import stat
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml


OTHER_NUMBER = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # YAML 1.1's: 010 is 8, and 1:30 is 90
MOST_YAML = 16 << 20  # bytes of a file
GROWTH, FEW = 10, 10_000  # how often what is written may stand there by aliases, and what any file may hold


class UserError(Exception):
    """Something that the user can mend; commands print it as one line and exit with this code."""
    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a wrong type, or an impossible value."""


def option(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, least: float | None = None,
           most: float | None = None, below: float | None = None) -> Any:
    """A dataclass field whose number, or each of whose numbers, lies from `least` to `most`, and under `below`.

    Without `least` a number must be above 0, as it must in a field without an option.
    """
    return dataclasses.field(default=default, default_factory=factory,
                             metadata={"least": least, "most": most, "below": below})


def show(value: Any) -> str:
    """A value in an error: short, whatever a stranger wrote there."""
    try:
        return reprlib.repr(value) if isinstance(value, (list, dict, tuple)) else repr(value)[:200]
    except ValueError:  # a number of more digits than Python prints
        return "a number of thousands of digits"


# ---- YAML ------------------------------------------------------------------------------------------------------

class Plain(str):
    """An unquoted YAML scalar that is no text to YAML: what was written, and what YAML takes it for.

    A run named 2026-11-25, 1_1 or on is a name, not a date, 11 or true.
    """
    value: Any

    def __new__(cls, text: str, value: Any) -> Plain:
        plain = super().__new__(cls, text)
        plain.value = value
        return plain


class _Strict(yaml.SafeLoader):
    """No key written twice, and no aliases that grow: a few lines of those stand for more than any memory holds."""

    def get_single_node(self) -> yaml.Node | None:
        node, sizes = super().get_single_node(), {}
        if node is not None and _things(node, sizes) > GROWTH * len(sizes) + FEW:
            raise ConfigError(f"not YAML that is read here: its aliases stand for more than {GROWTH} times of what it says")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in lines and key.value != "<<":
                raise ConfigError(f"{show(key.value)} is written twice, on lines {lines[key.value]} and "
                                  f"{key.start_mark.line + 1}, and one of the two would be lost; join them")
            lines[str(key.value)] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _things(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The nodes at and below one, each alias counted as all that it stands for; `sizes` holds those counted already."""
    if id(node) not in sizes:
        sizes[id(node)] = 1 << 62  # until it is known: of a node that holds itself
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        sizes[id(node)] = 1 + sum(_things(one, sizes) for item in inside for one in (item if isinstance(item, tuple) else [item]))
    return sizes[id(node)]


class _Loader(_Strict):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except ValueError:  # such as a date in month 13
            if not isinstance(node, yaml.ScalarNode):
                raise
            value = node.value
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, str)
        return Plain(node.value, value) if plain else value


def yaml_text(path: Path) -> str:
    """The text of a YAML file. Raises OSError where it is none: a named pipe would be waited for, /dev/zero has no end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR, "is no file", str(path))
    if status.st_size > MOST_YAML:
        raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than such a file has", str(path))
    return path.read_text(encoding="utf-8")


def read_yaml(text: str, plain: bool = True) -> Any:
    """YAML as plain values and, with `plain`, `Plain` scalars. Raises ConfigError, without the name of the file."""
    try:
        return yaml.load(text, _Loader if plain else _Strict)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML lets ValueError, KeyError, RecursionError and others through
        raise ConfigError(f"not YAML: {' '.join(str(error).split())[:200]}") from None


def apply_overrides(tree: dict, overrides: list[str] | tuple[str, ...]) -> dict:
    """`tree` with `section.key=value` overrides applied; the values are read as YAML."""
    given: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: overrides are written section.key=value")
        if given.setdefault(key, text) != text:
            raise ConfigError(f"{key}: is given twice, as {given[key]!r} and as {text!r}; leave one of them")
        try:
            value = read_yaml(text)
        except ConfigError:
            raise ConfigError(f"{key}: {text[:80]!r} is not a YAML value") from None
        if not isinstance(value, (list, dict)) and text.strip()[:1] not in ("'", '"', ""):
            # where a text is wanted, the whole of it: YAML takes what follows a # for a comment
            value = Plain(text.strip(), value.value if isinstance(value, Plain) else value)
        tree = _with(tree, key, value)
    return tree


def _with(tree: dict, key: str, value: Any) -> dict:
    *parents, leaf = key.split(".")
    node = tree = dict(tree)
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    node[leaf] = value
    return tree


# ---- dataclasses -----------------------------------------------------------------------------------------------

def build(cls: type, tree: Any, path: str = "", root: type | None = None) -> Any:
    """An instance of dataclass `cls` from the mapping `tree`; `path` names it in errors, `root` the whole schema."""
    root = root or cls
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys below it, got {show(tree)}")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    dotted = f"{path}." if path else ""
    for key in tree:
        if key not in fields:
            shown = key if str(key).isprintable() and len(str(key)) < 80 else show(key)
            raise ConfigError(f"{dotted}{shown}: unknown key; did you mean {_nearest(f'{dotted}{key}', dotted, fields, root)}?")
    required = [name for name, f in fields.items()
                if f.default is f.default_factory is dataclasses.MISSING and name not in tree]
    if required:
        raise ConfigError(f"{dotted}{required[0]}: required, and not set; add {dotted}{required[0]}")
    values = {key: _coerce(hints[key], value, f"{dotted}{key}", root) for key, value in tree.items()}
    for key, value in values.items():
        _check_bounds(value, f"{dotted}{key}", **fields[key].metadata)
    return cls(**values)


def _coerce(hint: Any, value: Any, path: str, root: type) -> Any:
    """`value` as the type `hint`; numbers may be written as strings, since PyYAML reads 3e-4 as one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not types.NoneType]
        if value is None or isinstance(value, Plain) and value.value is None:
            return None
        listed = next((h for h in options if isinstance(value, list) and typing.get_origin(h) is list), options[0])
        return _coerce(listed, value, path, root)
    if isinstance(value, Plain) and hint in (int, float) and OTHER_NUMBER.fullmatch(value):
        raise ConfigError(f"{path}: {show(str(value))} is {show(value.value)} to YAML (octal, or minutes); write it in decimal")
    if isinstance(value, Plain):
        as_text = value.value is not None and (hint is str or typing.get_origin(hint) is Literal)
        value = str(value) if as_text else value.value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path, root)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value)[:80], choices, n=1, cutoff=0.5) if isinstance(value, str) else None
        raise ConfigError(f"{path}: {show(value)} is not one of {', '.join(choices)}"
                          + (f"; did you mean {near[0]}?" if near else ""))
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list such as [a, b], got {show(value)}")
        return [_coerce(typing.get_args(hint)[0], item, f"{path}[{i}]", root) for i, item in enumerate(value)]
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = int(value) if isinstance(value, int) else float(value if str(value).isascii() else "other digits")
            if math.isfinite(number) and (hint is float or number == int(number)):
                return hint(number)
        except (ValueError, OverflowError):
            pass
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    article = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[hint]
    raise ConfigError(f"{path}: expected {article}, got {show(value)}")


def _check_bounds(value: Any, path: str, least: float | None = None, most: float | None = None,
                  below: float | None = None) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        most = (2 ** 63 - 1 if isinstance(number, int) else math.inf) if most is None else most
        if number < (least or 0) or number == 0 and least is None:
            why = "must not be negative" if number < 0 and least != -math.inf else "must be above 0"
            raise ConfigError(f"{path}: {show(number)} {f'is less than {least:g}' if least else why}")
        if number > most:
            raise ConfigError(f"{path}: {show(number)} is more than {most:g}")
        if below is not None and number >= below:
            raise ConfigError(f"{path}: {number!r} must lie from {least:g} up to, but not including, {below:g}")


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key below dataclass `cls`, sections included."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found += _keys(inner, f"{prefix}{name}.")
    return found


def _nearest(key: str, dotted: str, fields: dict, root: type) -> str:
    """The valid key most like `key`: the same leaf in another section, a near leaf here, then anything."""
    key = key[:200]
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
