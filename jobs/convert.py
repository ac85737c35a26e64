"""Convert weights between released files, our folders and training checkpoints.

python -m jobs.convert --source /weights/seedvr_ema_3b.pth --kind seedvr-3b --output /weights/3b.safetensors
"""

from pipeline.runtime.job_config import run_job
from pipeline.training import convert


def main() -> None:
    run_job(convert.ConvertConfig, __doc__, convert.run)


if __name__ == "__main__":
    main()
