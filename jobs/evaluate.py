"""Measure restored videos: PSNR, SSIM and NIQE per clip and as means; with `--task vae`, autoencoders.

ray job submit --working-dir . -- python -m jobs.evaluate --config configs/demo/evaluate.yaml \\
    --truth file:///set/hq --methods '{"ours": "file:///restored"}' --output file:///tables
ray job submit --working-dir . -- python -m jobs.evaluate --task vae --clips file:///clips \
    --autoencoders '{"ours": "file:///weights/vae"}' --output file:///tables
"""

import argparse
import sys

from pipeline.evaluation import evaluate, evaluate_vae
from pipeline.runtime.job_config import run_job


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=("restoration", "vae"), default="restoration")
    task, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if task.task == "vae":
        run_job(evaluate_vae.EvaluateVaeConfig, evaluate_vae.__doc__, evaluate_vae.run, rest)
    else:
        run_job(evaluate.EvaluateConfig, __doc__, evaluate.run, rest)


if __name__ == "__main__":
    main()
