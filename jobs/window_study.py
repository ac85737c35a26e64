"""Train the transformer with several window sizes for equally many steps: the paper's tables 3 and 4.

ray job submit --working-dir . -- python -m jobs.window_study --training configs/small/train_dit.yaml \\
    --training.data file:///data/run --training.output file:///data/unused --windows '["1x8x8", "5x16x16"]' \\
    --output file:///data/windows
"""

from pipeline.evaluation import window_study
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(window_study.WindowStudyConfig, __doc__, window_study.run)


if __name__ == "__main__":
    main()
