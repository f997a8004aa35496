"""YAML trees (differences only, one level of `base:`), `a.b=c` overrides, and the frozen dataclasses they make."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first takes a tenth of the time
type_hints = functools.cache(get_type_hints)


class ConfigError(ValueError):
    """A configuration that cannot be run, in one line: what is wrong, where, what would be right."""


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file, over its base if it names one, with `a.b=c` overrides.

    Raises ConfigError, always one line, for a missing file or bad YAML.
    """
    path = Path(path)
    tree = _read_yaml(path)
    if (base := tree.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: {base!r} should be the name of a YAML file beside it")
        parent = _read_yaml(path.parent / base)
        if "base" in parent:
            raise ConfigError(f"{path}: its base {base} has a base of its own; one level is allowed")
        tree = merge(parent, tree)
    return overridden(tree, overrides)


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A tree with `a.b=c` overrides. Raises ConfigError for what is none."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no override; write section.key=value, e.g. train.steps=1000")
        try:
            value: Any = yaml.load(text, Loader)
        except (yaml.YAMLError, UnicodeError):  # the latter of a name that is not UTF-8
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def to_tree(config: Any) -> dict[str, Any]:
    """A config as YAML has it: mappings, lists and numbers."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The whole resolved config; loading it gives an equal one."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=110)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.001, ...}"""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        nested = dataclasses.is_dataclass(value)
        out |= flat(value, f"{prefix}{f.name}.") if nested else {prefix + f.name: value}
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), Loader)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"cannot read config {path}: {error.strerror}{hint}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a config is a mapping of sections")
    return tree or {}


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`low` with the values of `high` in place of its own, section by section."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def build(cls: type, tree: Any, prefix: str = "", source: str = "", known: Sequence[str] = ()) -> Any:
    """The dataclass `cls` of a tree; its keys are told with `prefix`, and as of `source`.

    Raises ConfigError for an unknown key, naming the nearest of those `known`, by default `cls`'s, and for a value of
    the wrong type.
    """
    known = known or [prefix + key for key in flat(cls())]
    if not isinstance(tree, dict):
        raise _error(source, f"{prefix.rstrip('.')} is a section with keys, not {tree!r}")
    hints = type_hints(cls)
    for key in tree:
        if key not in hints:
            everywhere = [*known, *(prefix + name for name in hints)]
            near = difflib.get_close_matches(prefix + str(key), everywhere, 1, 0.5)
            near = near or [k for k in everywhere if k.rsplit(".", 1)[-1] == key][:1]
            hint = f"; did you mean {near[0]}?" if near else f"; know {', '.join(hints)}"
            raise _error(source, f"unknown key {prefix}{key}{hint}")
    values = {key: _convert(hints[key], value, prefix + key, source, known) for key, value in tree.items()}
    return cls(**values)


def _error(source: str, text: str) -> ConfigError:
    return ConfigError(f"{source}: {text}" if source else text)


def _convert(kind: Any, value: Any, key: str, source: str, known: Sequence[str]) -> Any:
    """`value` as the annotated type; YAML reads 1e-3 as text, so numbers are parsed from it too."""

    def bad(expected: str) -> ConfigError:
        return _error(source, f"{key}={value!r} should be {expected}")

    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, key + ".", source, known)
    if get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in get_args(kind) if a is not type(None)), value, key, source, known)
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        if not isinstance(value, list | tuple) or (rest != [...] and len(value) != 1 + len(rest)):
            raise bad("a list" if rest == [...] else f"a list of {1 + len(rest)} values")
        return tuple(_convert(item, v, f"{key}[{i}]", source, known) for i, v in enumerate(value))
    if kind is bool:
        if not isinstance(value, bool):
            raise bad("true or false")
        return value
    if kind is str:
        if value is None or isinstance(value, dict | list):
            raise bad("a text")
        return str(value)
    try:
        if isinstance(value, bool):
            raise ValueError
        if kind is int and isinstance(value, int):
            return value
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return int(number) if kind is int else number
    except (TypeError, ValueError, OverflowError):
        raise bad("a whole number" if kind is int else "a number") from None
