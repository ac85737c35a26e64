"""Bring a data root of version 0.1.0 up to date: its tables become Delta Lake tables.

python -m jobs.upgrade --data s3://bucket/run

It reads the files' footers and writes logs, no rows. It needs no Ray, and may be stopped and run again.
"""

from pipeline.data import upgrade
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(upgrade.UpgradeConfig, __doc__, upgrade.run)


if __name__ == "__main__":
    main()
