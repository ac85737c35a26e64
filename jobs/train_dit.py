"""Train the diffusion transformer on precomputed latents.

ray job submit --working-dir . -- python -m jobs.train_dit --config configs/small/train_dit.yaml \\
    --data file:///data/run --output file:///data/run
"""

from pipeline.runtime.job_config import run_job
from pipeline.training.runs import train_dit


def main() -> None:
    run_job(train_dit.TrainDitConfig, __doc__, train_dit.run)


if __name__ == "__main__":
    main()
