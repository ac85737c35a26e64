"""Restore videos and images of any length and size.

ray job submit --working-dir . -- python -m jobs.restore --config configs/demo/restore.yaml \\
    --input '["file:///data/old_tape.mp4"]' --output file:///data/restored \\
    --model.vae file:///data/run/weights/vae --model.weights file:///data/run/weights/dit
"""

from pipeline.restoration import restore
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(restore.RestoreConfig, __doc__, restore.run)


if __name__ == "__main__":
    main()
