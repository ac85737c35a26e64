"""Samples made while training: equal to precomputed ones in the first epoch, and exact in every one."""

import dataclasses

import pytest
import torch

from model.text_encoders import TINY_ENCODERS
from pipeline.data import precompute
from pipeline.data.cropping import Bucket
from pipeline.data.kept_clips import KeptClips
from pipeline.data.precompute import SampleConfig
from pipeline.data.sample_pixels import prepare_sample
from pipeline.runtime import stage
from pipeline.store import schema, storage
from pipeline.training.runs import train_dit
from pipeline.training.samples import latent_reader, online_latents
from tests.helpers.data_root import make_data_root
from tests.helpers.ranks import train
from tests.helpers.shards import run_here
from tests.helpers.tiny_models import save_vae
from tests.helpers.trainings import dit_config, losses, stage_config

BUCKETS = [Bucket(1, 64, 64), Bucket(5, 64, 64)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[str, str, SampleConfig]:
    """The same clips twice: with latents and, of the other, only clips/ and selection/."""
    vae = save_vae(tmp_path_factory.mktemp("vae"))
    urls = [
        make_data_root(tmp_path_factory.mktemp("data"), ["cup.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
        for _ in range(2)
    ]
    config = SampleConfig(vae=vae, buckets=BUCKETS, text=TINY_ENCODERS)
    stored = precompute.PrecomputeConfig(data=urls[0], vae=vae, text=TINY_ENCODERS, buckets=BUCKETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_shards", run_here)
        patch.setattr(
            precompute.EncodeShard,
            "_prepared",
            lambda self, planned: ((one, prepare_sample(one, self.config.pixels)) for one in planned),
        )
        kept, folder = KeptClips(urls[0]), storage.join(urls[0], schema.LATENTS)
        precompute._make(stored, kept, folder, stage.Summary("precompute"))
        online_latents.write_texts(config, urls[1])
    return urls[0], urls[1], config


def reader_of(url: str, config: SampleConfig) -> online_latents.OnlineReader:
    return online_latents.OnlineReader(config, url, 0, torch.device("cpu"), torch.float32)


def test_the_first_epoch_is_what_precompute_stores_and_later_ones_are_new(roots):
    stored_url, online_url, config = roots
    index = latent_reader.read_index(stored_url)
    made = online_latents.sample_table(online_latents.planned_samples(config, online_url, seed=0))
    shared = ["sample_id", "clip_id", "split", "bucket", "video_tokens", "text_tokens"]
    assert sorted(made.select(shared).to_pylist(), key=str) == sorted(
        index.select(shared).to_pylist(), key=str
    )
    stored, reader = latent_reader.LatentReader(stored_url), reader_of(online_url, config)
    for row in index.to_pylist():
        for ours, theirs in zip(reader.latents(row, 0), stored.latents(row, 0), strict=True):
            assert torch.equal(ours, theirs)
    row = index.to_pylist()[0]
    again = reader_of(online_url, config)
    assert torch.equal(reader.latents(row, 3)[1], again.latents(row, 3)[1])
    assert not torch.equal(reader.latents(row, 3)[1], reader.latents(row, 2)[1])
    assert torch.equal(reader.latents(row, -1)[0], stored.latents(row, 0)[0])  # held out: as precomputed


def test_a_clip_that_cannot_be_read_stops_the_run_with_its_name(roots):
    _, url, config = roots
    reader = reader_of(url, config)
    sample_id = next(iter(reader.planned))
    reader.planned[sample_id]["clip"]["uri"] = "file:///gone.mp4"
    with pytest.raises(ValueError, match=r"^online: .*file:///gone\.mp4"):
        reader.latents({"sample_id": sample_id}, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_online_gives_the_losses_of_precomputed_latents_in_the_first_epoch(roots, tmp_path):
    stored_url, online_url, config = roots
    whole = stage_config("mixed", 1, ["1x64x64", "5x64x64"])
    stages = [dataclasses.replace(whole, tokens_per_pack=48)]  # one epoch
    shared = {"stages": stages, "heldout_triples": 4, "packs_per_step": 1}
    configs = (
        dit_config(stored_url, tmp_path / "stored", **shared),
        dit_config(online_url, tmp_path / "online", online=config, **shared),
    )
    train(1, tmp_path / "ranks", *[(train_dit.build, config) for config in configs])
    torch.testing.assert_close(losses(tmp_path / "online"), losses(tmp_path / "stored"), rtol=0, atol=1e-6)
