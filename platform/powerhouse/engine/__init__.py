"""Inference: requests in, tokens out. No Ray, no HTTP."""

from powerhouse.engine.batched import AnsweringModel, TextEncoder
from powerhouse.engine.completion import Completion
from powerhouse.engine.constraint import Constraint
from powerhouse.engine.engine import Engine
from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.params import SamplingParams
from powerhouse.engine.request import Output
from powerhouse.engine.runner import LocalRunner, PipelineRunner, Runner
from powerhouse.engine.settings import EngineConfig, SpeculationConfig
from powerhouse.engine.streaming import EngineLoop, Stream
from powerhouse.engine.worker import run_stage

__all__ = [
    "AnsweringModel",
    "Completion",
    "Constraint",
    "Engine",
    "EngineConfig",
    "EngineLoop",
    "LocalRunner",
    "Output",
    "PipelineRunner",
    "Runner",
    "SamplingParams",
    "SpeculationConfig",
    "Stream",
    "TextEncoder",
    "TokenLogprobs",
    "run_stage",
]
