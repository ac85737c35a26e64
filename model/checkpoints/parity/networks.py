"""Cases of the released transformers and the released autoencoder: whole networks at tiny widths."""

from collections.abc import Iterator

import torch

from model.checkpoints.autoencoder import build_autoencoder, released_autoencoder_config
from model.checkpoints.parity.comparison import Case, Comparison, compare
from model.checkpoints.transformer import build_backbone, released_backbone_config
from model.dit.windows import Grid


@torch.no_grad()
def check_autoencoder(case: Case) -> Iterator[Comparison]:
    """Each clip's moments and decoded mean, in one pass and streamed.

    The stream's slices are one and two latent frames long (4 and 8 frames at full size). The decoder gets the
    recorded mean, so that the error measured is its own and not the encoder's, amplified.
    """
    config = released_autoencoder_config(case.header["config"])
    autoencoder = build_autoencoder(config, case.part("state"), case.source)
    inputs, recorded = case.part("in"), case.part("out")
    for clip in sorted({name.split(".")[0] for name in inputs}):
        video = inputs[f"{clip}.x"]
        recorded_mean = recorded[f"{clip}.mean"]
        mean, log_variance = autoencoder.encode(video)
        yield compare(f"{clip}.mean", mean, recorded_mean)
        yield compare(f"{clip}.logvar", log_variance, recorded[f"{clip}.logvar"])
        yield compare(f"{clip}.dec", autoencoder.decode_unscaled(recorded_mean), recorded[f"{clip}.dec"])
        for slice_frames in (config.time_factor, 2 * config.time_factor):
            moments = list(autoencoder.encode_stream([video], slice_frames))
            means = torch.cat([m for m, _ in moments], dim=2)
            log_variances = torch.cat([v for _, v in moments], dim=2)
            latent = autoencoder.to_latent(recorded_mean, log_variances, noise=None)
            frames, height, width = video.shape[2:]
            decoded = autoencoder.decode_stream([latent], frames, height, width, slice_frames)
            streamed = f"slices of {slice_frames}: {clip}"
            yield compare(f"{streamed}.mean", means, recorded_mean)
            yield compare(f"{streamed}.logvar", log_variances, recorded[f"{clip}.logvar"])
            yield compare(f"{streamed}.dec", torch.cat(list(decoded), dim=2), recorded[f"{clip}.dec"])


@torch.no_grad()
def check_backbone(case: Case) -> Iterator[Comparison]:
    """Velocities of all videos, one call each and then packed into one call."""
    backbone = build_backbone(
        released_backbone_config(case.header["config"]), case.part("state"), case.source
    )
    inputs, recorded = case.part("in"), case.part("out")["vid"]
    grids: list[Grid] = [(t, h, w) for t, h, w in inputs["vid_shape"].tolist()]
    text_lengths: list[int] = inputs["txt_shape"].flatten().tolist()
    rows = [t * h * w for t, h, w in grids]
    packed = backbone(inputs["vid"], inputs["txt"], grids, text_lengths, inputs["timestep"])
    videos, texts = inputs["vid"].split(rows), inputs["txt"].split(text_lengths)
    for i, (grid, length) in enumerate(zip(grids, text_lengths, strict=True)):
        alone = backbone(videos[i], texts[i], [grid], [length], inputs["timestep"][i : i + 1])
        yield compare(f"video {i} alone", alone, recorded.split(rows)[i])
        yield compare(f"video {i} packed", packed.split(rows)[i], recorded.split(rows)[i])
