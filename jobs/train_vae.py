"""Train the causal video autoencoder.

ray job submit --working-dir . -- python -m jobs.train_vae --config configs/demo/train_vae.yaml \\
    --data file:///data/run --output file:///data/run
"""

from pipeline.runtime.job_config import run_job
from pipeline.training.runs import train_vae


def main() -> None:
    run_job(train_vae.TrainVaeConfig, __doc__, train_vae.run)


if __name__ == "__main__":
    main()
