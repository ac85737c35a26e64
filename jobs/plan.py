"""Estimate what training the transformer takes: memory by part, operations, hours and cost. Runs nothing.

python -m jobs.plan --config configs/paper/train_dit.yaml

It takes every argument of jobs.train_dit.
"""

from pipeline.runtime.job_config import run_job
from pipeline.training import cost_plan


def main() -> None:
    run_job(cost_plan.PlanConfig, __doc__, lambda config: print(cost_plan.describe(config)))


if __name__ == "__main__":
    main()
