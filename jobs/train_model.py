"""Train a decoder on packed tokens; run again after a kill, it goes on from its last checkpoint.

ray job submit --runtime-env jobs/runtime_env.yaml -- python jobs/train_model.py --config jobs/configs/tiny.yaml
"""

from powerhouse.job import run
from powerhouse.training.config import TrainingConfig
from powerhouse.training.launch import train_model

if __name__ == "__main__":
    run(train_model, TrainingConfig, __doc__ or "")
