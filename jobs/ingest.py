"""Cut videos and images into clips: writes <output>/clips.

    ray job submit --working-dir . -- python -m jobs.ingest --config configs/demo/ingest.yaml \
        --input file:///data/raw --output file:///data/root

Run again, it resumes where it was killed, and adds only files that are new.
"""

from pipeline.data import ingest
from pipeline.runtime.job_config import run_job


def main() -> None:
    run_job(ingest.IngestConfig, __doc__, ingest.run)


if __name__ == "__main__":
    main()
