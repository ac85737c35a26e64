"""Score every clip, then decide which are kept.

ray job submit --working-dir . -- python -m jobs.filter --config configs/demo/filter.yaml --data file:///data/run
"""

from pipeline.data import filter as filter_stage
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(filter_stage.FilterConfig, __doc__, filter_stage.run)


if __name__ == "__main__":
    main()
