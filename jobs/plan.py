"""What a training of the transformer will take: memory by part, operations, hours and cost. Nothing is run.

python -m jobs.plan --config configs/paper/train_dit.yaml

It takes every argument of jobs.train_dit.
"""

from pipeline import plan
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(plan.PlanConfig, __doc__, lambda config: print(plan.describe(config)))


if __name__ == "__main__":
    main()
