"""Compute text embeddings and HQ/LQ latents of the kept clips.

ray job submit --working-dir . -- python -m jobs.precompute --config configs/demo/precompute.yaml \\
    --data file:///data/run --vae file:///data/run/weights/vae
"""

from pipeline.data import precompute
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(precompute.PrecomputeConfig, __doc__, precompute.run)


if __name__ == "__main__":
    main()
