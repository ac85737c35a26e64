"""filter and precompute on one data root after another, as a driver: VAE ADDRESS SHARED.

SHARED: "shared" if all nodes see the same files. Says "ready", reads lines "STAGE ROOT", and says "done" to
each; what the stages say goes to stderr.
"""

import sys

import ray

from model.text_encoders import TINY_ENCODERS
from pipeline.data import filter as filter_stage
from pipeline.data import precompute
from pipeline.data.cropping import Bucket
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.data.precompute import PrecomputeConfig


def run(stage: str, data: str, vae: str, shared: bool) -> None:
    if stage == "filter":
        config = FilterConfig(
            data=data,
            thresholds={"exposure": Threshold(min=1)},
            niqe_frames=0,
            clips_per_shard=2,
            shared_filesystem=shared,
        )
        filter_stage.run(config)
    else:
        making = PrecomputeConfig(
            data=data,
            vae=vae,
            text=TINY_ENCODERS,
            buckets=[Bucket(1, 64, 64), Bucket(5, 64, 64)],
            variants=3,
            samples_per_shard=3,
            shared_filesystem=shared,
        )
        precompute.run(making)


if __name__ == "__main__":
    vae, address, shared = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    words, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=words, flush=True)
    for line in sys.stdin:
        stage, data = line.split()
        run(stage, data, vae, shared == "shared")
        print("done", file=words, flush=True)
