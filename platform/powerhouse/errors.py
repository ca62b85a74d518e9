"""Every error that Powerhouse raises on purpose.

    PowerhouseError
     ├── ConfigError (ValueError)       a setting is unknown, missing or out of range
     ├── InputError (ValueError)        data from outside is missing, empty or damaged
     │    └── ModelFormatError          ... a model directory
     ├── ArtifactError                  a stage's folder is unfinished, foreign or not what its manifest says
     ├── TrainingError                  a run that cannot go on: its loss is no number, its workers fail, it is told to end
     ├── RequestError (ValueError)      an inference request that can never be served
     │    └── QueueFullError            ... now: it may be sent again later
     ├── EngineError                    a pipeline stage is lost or broke, and the engine with it
     └── ClusterError                   the Ray cluster, a port or a process is not as needed

Each says what is wrong, what was got, what is allowed and what to do. `assert` is kept for what only a bug can break.
"""

from __future__ import annotations


class PowerhouseError(Exception):
    """The base of the errors whose message alone, without a traceback, is meant for the user."""

    def __init__(self, what: str, *, got: object = None, allowed: object = None, do: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if do is not None:
            parts.append(f"do: {do}")
        super().__init__("\n  ".join(parts))


class ConfigError(PowerhouseError, ValueError):
    pass


class InputError(PowerhouseError, ValueError):
    pass


class ModelFormatError(InputError):
    pass


class ArtifactError(PowerhouseError):
    pass


class TrainingError(PowerhouseError):
    pass


class RequestError(PowerhouseError, ValueError):
    pass


class QueueFullError(RequestError):
    pass


class EngineError(PowerhouseError):
    pass


class ClusterError(PowerhouseError):
    pass
