"""Score a model on held-out documents: bits per byte, beside token frequencies and `xz -9` on the same text.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate_model.py --config jobs/configs/evaluation.yaml
"""

from powerhouse.evaluation.launch import EvaluationConfig, evaluate_model
from powerhouse.job import run

if __name__ == "__main__":
    run(evaluate_model, EvaluationConfig, __doc__ or "")
