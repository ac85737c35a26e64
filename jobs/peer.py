"""Run another restoration method on a folder and measure what it costs.

python -m jobs.peer --method bicubic --input /set/lq --output /results/bicubic --scale 1
"""

from pipeline.evaluation import peers
from pipeline.runtime.job_config import run_job


def run(config: peers.PeerConfig) -> None:
    cost = peers.run(config)
    for key, value in cost.items():
        print(f"   {key}: {value}")


def main() -> None:
    run_job(peers.PeerConfig, __doc__, run)


if __name__ == "__main__":
    main()
