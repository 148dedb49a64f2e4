"""Reads a configuration from one YAML file and `--set` pairs.

Unknown keys and wrong values are `UserError`s that name file and line.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt

from kineticlip.config.official import is_official, translate
from kineticlip.config.schema import Config
from kineticlip.runtime.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

# Of pydantic: values outside the bounds of their annotation.
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file (None: all defaults) and applies `key=value` overrides in order.

    path may also be the bare name of a recipe that ships with the engine. An official Text4Vis or
    BIKE file is translated; each of its keys that has no effect is logged as a warning. Raises
    UserError for a missing or malformed file, an unknown key and a value of a wrong type.
    """
    config, notes = read_config(path, overrides)
    for note in notes:
        log.warning(note)
    return config


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """`load_config`, and the notes on an official file instead of warnings."""
    where: dict[str, str] = {}
    values: dict[str, Any] = {}
    notes: list[str] = []
    if path is not None:
        values = _read_yaml(_locate(path), where, notes)
    for pair in overrides:
        _apply_override(values, pair, where)
    return _validate(values, where, str(path) if path is not None else "--set"), notes


def override(config: Config, pairs: Sequence[str]) -> Config:
    """The configuration with `key=value` pairs applied in order."""
    where: dict[str, str] = {}
    values = config_to_dict(config)
    for pair in pairs:
        _apply_override(values, pair, where)
    return _validate(values, where, "--set")


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The configuration of plain data, such as a weights file's metadata; `source` is named in
    errors."""
    _check_keys(values, Config, "", {}, source)
    return _validate(dict(values), {}, source)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain data, ready for YAML or JSON."""
    plain = dataclasses.asdict(config)
    return {key: _plain(value) for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def recipes() -> dict[str, Path]:
    """The recipes that ship with the engine, by name."""
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parents[1] / "configs")
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def _locate(path: str | Path) -> Path:
    """The file itself, or the recipe of that name: beside this package, or in the repository."""
    given = Path(path)
    if given.exists() or given.suffix or len(given.parts) != 1:
        return given
    found = recipes()
    if given.name not in found:
        raise UserError(
            f"{path}: no such file, and no recipe of that name. {did_you_mean(str(path), found)}"
        )
    return found[given.name]


def _read_yaml(path: Path, where: dict[str, str], notes: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{path}{line}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: expected a mapping of config keys")
    lines: dict[str, str] = {}
    for dotted, number in _key_lines(node, ""):
        if dotted in lines:
            raise UserError(f"{path}:{number}: '{dotted}' stands in {lines[dotted]} already")
        lines[dotted] = f"{path}:{number}"
    if is_official(values):
        official = translate(values, lines, str(path))
        values, lines = official.values, official.where
        notes += official.notes
    where.update(lines)
    _check_keys(values, Config, "", where, str(path))
    return dict(values)


def _key_lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key.start_mark.line + 1
        yield from _key_lines(value, f"{dotted}.")


def _check_keys(
    values: Mapping[Any, Any], kind: type, prefix: str, where: Mapping[str, str], source: str
) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        place = where.get(dotted, source)
        if key not in hints:
            raise UserError(f"{place}: unknown key '{dotted}'. {did_you_mean(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{place}: '{dotted}' should be a mapping, got {value!r}")
            _check_keys(value, hints[key], f"{dotted}.", where, source)
        elif isinstance(value, Mapping):
            raise UserError(f"{place}: '{dotted}' should be a single value, not a mapping")


def _apply_override(values: dict[str, Any], pair: str, where: dict[str, str]) -> None:
    dotted, equals, text = pair.partition("=")
    place = f"--set {pair}"
    if not equals:
        raise UserError(f"{place}: expected key=value")
    *parents, leaf = dotted.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if _type_of(dotted) == "str" and not isinstance(value, str):
        value = text  # the template {}, the name 8: words, whatever YAML makes of them
    node: Any = value if value is not None or text.strip() in ("null", "~") else ""
    nested: dict[str, Any] = {leaf: node}
    for parent in reversed(parents):
        nested = {parent: nested}
    _check_keys(nested, Config, "", {dotted: place}, place)
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
    target[leaf] = node
    where[dotted] = place


def _type_of(dotted: str) -> str | None:
    """The annotation of a dotted key; None where there is no such key."""
    kind: Any = Config
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = get_type_hints(kind).get(part)
    return getattr(kind, "__name__", None)


def _validate(values: dict[str, Any], where: Mapping[str, str], source: str) -> Config:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        problems = [_problem(item, where, source) for item in error.errors()]
        raise UserError("; ".join(problems)) from None


def _problem(item: Mapping[str, Any], where: Mapping[str, str], source: str) -> str:
    """One error of pydantic's as a sentence with its place."""
    dotted = ".".join(part for part in item["loc"] if isinstance(part, str))
    place = where.get(dotted, source)
    if item["type"] in OUT_OF_RANGE:
        kind, *bounds = get_args(_annotation(item["loc"]))
        value = kind(item["input"])
        return f"{place}: '{dotted}' should be {_range(bounds, value)}, got {value}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{place}: '{dotted}': {message}, got {item['input']!r}"


def _annotation(location: Sequence[str | int]) -> Any:
    """The annotation at a place of the configuration, its bounds included."""
    kind: Any = Config
    for part in location:
        if isinstance(part, str):
            kind = get_type_hints(kind, include_extras=True)[part]
        else:  # of a tuple, with a kind for each place or one for all
            kinds = [each for each in get_args(kind) if each is not Ellipsis]
            kind = kinds[min(part, len(kinds) - 1)]
    return kind


def _range(bounds: Sequence[Ge | Gt | Le | Lt], value: float) -> str:
    """The bounds in words: `at least 1`, `from 0 to below 1`."""
    limits = {name: limit for bound in bounds for name, limit in dataclasses.asdict(bound).items()}
    low, high = limits.get("ge", limits.get("gt")), limits.get("lt", limits.get("le"))
    if high == math.inf and (value == math.inf or low == -math.inf):
        return "finite"
    if high in (None, math.inf):
        return f"at least {low}" if "ge" in limits else f"above {low}"
    return f"from {low} to {'below ' if 'lt' in limits else ''}{high}"
