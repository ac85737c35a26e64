"""Draw quality against time per frame, with parameters and peak memory, from an evaluation.

python -m jobs.figure --evaluation file:///tables --output file:///tables --metric psnr_rgb
"""

from pipeline.evaluation import cost_figure
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(cost_figure.FigureConfig, __doc__, cost_figure.run)


if __name__ == "__main__":
    main()
