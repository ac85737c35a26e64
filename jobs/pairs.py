"""Make a synthetic benchmark of lossless HQ and LQ files from clips.

ray job submit --working-dir . -- python -m jobs.pairs --folder s3://bucket/clips --output s3://bucket/set
"""

from pipeline.evaluation import synthetic_pairs
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(synthetic_pairs.PairsConfig, __doc__, synthetic_pairs.run)


if __name__ == "__main__":
    main()
