"""Say what a training run takes before it is started: parameters, memory, tokens, steps, FLOPs, time; refuse what cannot fit.

python jobs/plan_training.py --config jobs/configs/1b.yaml plan.device=H100 plan.row_length=4097 run.num_workers=8
"""

from powerhouse.job import run
from powerhouse.training.plan import PlanConfig, plan_training

if __name__ == "__main__":
    run(plan_training, PlanConfig, __doc__ or "")
