"""What every script under jobs/ does: parse one config, call one function, say where the result lies."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import NoReturn

from powerhouse.artifacts import Artifact, NotDoneError, checking
from powerhouse.config import ConfigType, parse_command_line
from powerhouse.errors import PowerhouseError

CHECK = "--check"
FAILED, NOT_DONE = 2, 3


def run(function: Callable[[ConfigType], Artifact | str], config_class: type[ConfigType], usage: str) -> NoReturn:
    """Exit 0 with the artifact's counts and path, or the answer, on the last lines, or 2 with one clear error.

    With `--check` nothing is done: exit 3 where the job would have work to do.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != CHECK]
    usage += f"\n{CHECK}: do nothing; exit {NOT_DONE} if there is work to do"
    mode = checking() if CHECK in sys.argv[1:] else contextlib.nullcontext()
    try:
        with mode:
            result = function(parse_command_line(config_class, arguments, usage))
    except PowerhouseError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(NOT_DONE if isinstance(error, NotDoneError) else FAILED)
    sys.stdout.write(result if isinstance(result, str) else _describe(result))
    sys.stdout.write("\n")
    sys.exit(0)


def _describe(artifact: Artifact) -> str:
    counts = "  ".join(f"{name}={value:,}" for name, value in artifact.manifest.counts.items())
    return f"{counts}\n{artifact.manifest.kind}: {artifact.path}"
