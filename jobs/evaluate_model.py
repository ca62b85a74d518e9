"""Score a model: tasks declared in YAML, and held-out documents beside token frequencies and `xz -9` on the same text.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate_model.py --config jobs/configs/evaluation.yaml
"""

from functools import partial

from powerhouse.artifacts import Artifact
from powerhouse.config import validate
from powerhouse.engine import EngineConfig
from powerhouse.engine.offline import OfflineModel
from powerhouse.evaluation.launch import evaluate_model
from powerhouse.evaluation.settings import EvaluationConfig
from powerhouse.job import run


def evaluate(config: EvaluationConfig) -> Artifact:
    """Have decoders answer through the engine."""
    settings = {"dtype": config.precision, "device": config.device, "num_threads": config.num_threads} | config.engine
    return evaluate_model(config, partial(OfflineModel, config=validate(EngineConfig, settings, "engine")))


if __name__ == "__main__":
    run(evaluate, EvaluationConfig, __doc__ or "")
