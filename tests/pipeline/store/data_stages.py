"""ingest, filter and precompute, one after the other, of each data root: RAW VAE DATA..., all URLs.

After each root it says "done" and waits for a line. What the stages say goes to stderr.
"""

import sys

from model.text_encoders import TINY_ENCODERS
from pipeline.data import filter as filter_stage
from pipeline.data import ingest, precompute
from pipeline.data.cropping import Bucket
from pipeline.data.filter import FilterConfig, Threshold
from pipeline.data.precompute import PrecomputeConfig


def run(raw: str, vae: str, data: str) -> None:
    ingest.run(ingest.IngestConfig(input=raw, output=data, max_clip_frames=25, sources_per_shard=2))
    thresholds = {"exposure": Threshold(min=1)}
    filter_stage.run(FilterConfig(data=data, thresholds=thresholds, niqe_frames=0, clips_per_shard=4))
    buckets = [Bucket(1, 64, 64), Bucket(5, 64, 64)]
    precompute.run(
        PrecomputeConfig(data=data, vae=vae, text=TINY_ENCODERS, buckets=buckets, samples_per_shard=4)
    )


if __name__ == "__main__":
    raw, vae, *roots = sys.argv[1:]
    words, sys.stdout = sys.stdout, sys.stderr
    for root in roots:
        run(raw, vae, root)
        print("done", file=words, flush=True)
        sys.stdin.readline()
