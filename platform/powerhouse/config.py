"""One typed, frozen object out of a YAML file and dotted overrides.

    python jobs/train_model.py --config jobs/configs/tiny.yaml optim.lr=3e-4

The docstring under a field is its help text. A mistake is one readable error that names the file, the dotted path,
what was got and what is allowed. Relative paths of data lie under the storage root (see `storage_root`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from powerhouse.errors import ConfigError

STORAGE_VARIABLE = "POWERHOUSE_STORAGE"


class Config(BaseModel):
    """The base of every settings object: frozen, typed, and closed to unknown keys."""

    positional: ClassVar[str | None] = None
    """The setting that a bare word on the command line means; none unless a class says so."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


ConfigType = TypeVar("ConfigType", bound=Config)


def storage_root() -> Path:
    """Where relative data paths lie: $POWERHOUSE_STORAGE, which every node must see, else `runs` in the current folder."""
    return Path(os.environ.get(STORAGE_VARIABLE, "runs")).absolute()


StoragePath = Annotated[Path, AfterValidator(lambda path: storage_root() / path)]
"""A path of data: absolute as it is, relative under the storage root. A job submitted to Ray runs in a throw-away copy of
the working directory, so a path relative to the current folder would be lost with it."""


def parse_command_line(config_class: type[ConfigType], argv: Sequence[str], usage: str) -> ConfigType:
    """Read `--config FILE key=value ...`; `--help` lists every field with its default."""
    parser = argparse.ArgumentParser(
        description=usage, epilog=describe(config_class), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file with the settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted path and its value, read as YAML")
    arguments = parser.parse_intermixed_args(argv)
    bare = config_class.positional
    overrides = [f"{bare}={word}" if bare and "=" not in word else word for word in arguments.overrides]
    return load(config_class, arguments.config, overrides)


def load(config_class: type[ConfigType], path: Path | None, overrides: Sequence[str] = ()) -> ConfigType:
    """Validate the file's values with the overrides laid over them.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or a key or a value is not allowed.
    """
    values = _read_yaml(path) if path else {}
    for override in overrides:
        _apply(values, override)
    return validate(config_class, values, str(path) if path else "command line")


def validate(config_class: type[ConfigType], values: object, source: str) -> ConfigType:
    """Make the typed object, or one ConfigError with a line for every mistake; `source` names where the values stood."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(config_class, item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file", got=path.absolute(), do="give --config an existing YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file", got=str(error).replace("\n", " ")) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping", got=type(values).__name__, allowed="`key: value` lines")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise ConfigError("not an override", got=repr(override), allowed="key=value, for example optim.lr=3e-4")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {parent} is not a group of settings", got=repr(values))
    values[last] = yaml.safe_load(text)


def _explain(config_class: type[Config], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "(whole)"
    if item["type"] == "extra_forbidden":
        names = list(_fields_at(config_class, item["loc"][:-1]))
        close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{path}: unknown key{hint} allowed: {', '.join(sorted(names))}"
    if item["type"] == "missing":
        return f"{path}: missing, and it has no default; do: set it in the file or add {path}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: got {item['input']!r}; allowed: {message[0].lower()}{message[1:]}"


def _fields_at(config_class: type[Config], location: tuple[Any, ...]) -> dict[str, Any]:
    for part in location:
        if isinstance(part, int):
            continue
        field = config_class.model_fields.get(part)
        nested = _config_in(field.annotation) if field else None
        if nested is None:
            return {}
        config_class = nested
    return _fields(config_class)


def _fields(config_class: type[Config]) -> dict[str, Any]:
    """The settings of a group; where it is one of several kinds, those of all of them."""
    fields = dict(config_class.model_fields)
    for kind in config_class.__subclasses__():
        fields = _fields(kind) | fields
    return fields


def _config_in(annotation: Any) -> type[Config] | None:
    """The Config class inside an annotation such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Config) else None
    return next((found for part in typing.get_args(annotation) if (found := _config_in(part))), None)


def describe(config_class: type[Config], prefix: str = "") -> str:
    """One line a field: dotted path, type, default, help text."""
    lines = []
    for name, field in _fields(config_class).items():
        nested = _config_in(field.annotation)
        if nested is not None and isinstance(field.annotation, type):
            lines.append(describe(nested, f"{prefix}{name}."))
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {prefix}{name}  ({default})\n      {field.description or ''}")
    return "\n".join(lines)
