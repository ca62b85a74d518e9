"""What every script under jobs/ does: parse one config, call one function, say where the result lies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from powerhouse.artifacts import Artifact
from powerhouse.config import ConfigType, parse_command_line
from powerhouse.errors import PowerhouseError


def run(function: Callable[[ConfigType], Artifact], config_class: type[ConfigType], usage: str) -> NoReturn:
    """Exit 0 with the artifact's path and counts on the last lines, or 2 with one clear error."""
    try:
        artifact = function(parse_command_line(config_class, sys.argv[1:], usage))
    except PowerhouseError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    counts = "  ".join(f"{name}={value:,}" for name, value in artifact.manifest.counts.items())
    sys.stdout.write(f"{counts}\n{artifact.manifest.kind}: {artifact.path}\n")
    sys.exit(0)
