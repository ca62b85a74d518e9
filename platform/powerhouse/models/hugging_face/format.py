"""What the hub asks of a family's format, and how tensors' names are translated."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from powerhouse.errors import ModelFormatError
from powerhouse.models.model import Model, ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


class Format(ABC):
    """One family on disk."""

    config_class: type[ModelConfig]
    model_class: type[Model]

    @abstractmethod
    def read(self, values: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        """Our settings out of a `config.json` and of which tensors there are.

        Raises:
            ModelFormatError: a value asks for what is not supported.
        """

    @abstractmethod
    def write(self, config: Any) -> dict[str, Any]:
        """The `config.json` that transformers reads."""

    def name(self, ours: str, config: Any) -> str:
        """A tensor's name in a checkpoint."""
        return ours

    def is_ignored(self, theirs: str, config: Any) -> bool:
        """Whether a tensor of a checkpoint has no place here on purpose: a tied copy, a table that is computed."""
        return False


def translate(ours: str, rules: Iterable[tuple[str, str]]) -> str:
    """Replace the start of a name by the first rule that fits; `{}` stands for a layer's number."""
    for pattern, theirs in rules:
        match = re.match(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)", ours)
        if match:
            return theirs.format(*match.groups()) + ours[match.end() :]
    return ours


def require(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a setting whose other values would need code that is not here; one that is absent has the wanted value."""
    for name, allowed in wanted.items():
        if values.get(name, allowed) != allowed:
            raise ModelFormatError(f"config.json: {name} is not supported", got=values[name], allowed=allowed)


def choose(values: Mapping[str, Any], name: str, default: str, choices: Mapping[str, str]) -> str:
    """Our name for a setting that is one of several."""
    got = values.get(name, default)
    if got not in choices:
        raise ModelFormatError(f"config.json: {name} is not supported", got=got, allowed=", ".join(choices))
    return choices[got]


def pick(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings that have the same name on both sides."""
    return {name: values[name] for name in names if values.get(name) is not None}
