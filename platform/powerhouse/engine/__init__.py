"""Inference: requests in, tokens out. No Ray, no HTTP."""

from powerhouse.engine.engine import Completion, Engine
from powerhouse.engine.logprobs import TokenLogprobs
from powerhouse.engine.request import Output, SamplingParams
from powerhouse.engine.runner import LocalRunner, PipelineRunner, Runner
from powerhouse.engine.settings import EngineConfig
from powerhouse.engine.worker import run_stage

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "LocalRunner",
    "Output",
    "PipelineRunner",
    "Runner",
    "SamplingParams",
    "TokenLogprobs",
    "run_stage",
]
