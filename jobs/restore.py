"""Restore videos and images of any length and size.

ray job submit --working-dir . -- python -m jobs.restore --config configs/demo/restore.yaml
"""

from pipeline import restore
from pipeline.config import run_job


def main() -> None:
    run_job(restore.RestoreConfig, __doc__, restore.run)


if __name__ == "__main__":
    main()
