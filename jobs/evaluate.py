"""Measure restored videos: PSNR, SSIM and NIQE per clip and as means.

ray job submit --working-dir . -- python -m jobs.evaluate --config configs/demo/evaluate.yaml
"""

from pipeline import evaluate
from pipeline.config import run_job


def main() -> None:
    run_job(evaluate.EvaluateConfig, __doc__, evaluate.run)


if __name__ == "__main__":
    main()
