"""Autoencoders measured as in table 2 of the SeedVR paper: PSNR, SSIM, LPIPS and rFVD of reconstructed clips.

    python -m jobs.evaluate --task vae --clips file:///clips --output file:///tables \\
        --autoencoders '{"ours": "file:///weights/vae", "CogVideoX": "file:///models/cogvideox/vae"}'

Ours are a folder that training wrote or the released `ema_vae` file; any autoencoder of diffusers is a folder
with its `config.json`. All see the same frames and are decoded from the mode of their posterior, in fp32.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from model.checkpoints import load_autoencoder
from model.perceptual.lpips import Lpips
from model.vae import CausalVideoAutoencoder
from pipeline.evaluation import comparison_tables, published
from pipeline.evaluation.diffusers_vae import CONFIG_FILE, DiffusersAutoencoder
from pipeline.evaluation.evaluate import bicubic, media_files, summarise
from pipeline.metrics import frechet
from pipeline.metrics.psnr_ssim import full_reference_scores
from pipeline.restoration.vae_reconstruction import reconstruct
from pipeline.runtime import stage
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding
from pipeline.video.sandbox import Sandbox
from pipeline.weights import weights_folder
from pipeline.weights.lpips_weights import check_perceptual, load_perceptual

RESULTS = "vae_evaluation"
METRICS = ("psnr_rgb", "ssim_rgb", "lpips")
SLICE_FRAMES = 8
TITLES = {"psnr_rgb": "PSNR ↑", "ssim_rgb": "SSIM ↑", "lpips": "LPIPS ↓", "rfvd": "rFVD ↓"}
DECIMALS = {"psnr_rgb": 2, "ssim_rgb": 4, "lpips": 4, "rfvd": 2}
_PAPERS_METRICS = ("psnr", "ssim", "lpips", "rfvd")
_PAPERS_SHAPE = ("temporal_compression", "spatial_compression", "latent_channels")


@dataclasses.dataclass(frozen=True)
class EvaluateVaeConfig:
    """What `jobs.evaluate --task vae` reads."""

    autoencoders: dict[str, Url]
    """Autoencoders to compare: each name with the absolute URL of a weights folder that training wrote, of
    the released `ema_vae` file (.pth or .safetensors), or of a diffusers folder (config.json and
    safetensors)."""
    clips: Url
    """Absolute URL of a folder with videos; lossless or lightly compressed ones tell autoencoders apart
    best."""
    output: Url
    """Absolute URL of the folder to which vae_evaluation.json and vae_evaluation.md are written."""
    frames: int = 17
    """Number of frames used from the start of each clip; 4n+1 frames need no padding, and a shorter clip
    becomes an error row."""
    size: list[int] = dataclasses.field(default_factory=list)
    """Height and width in pixels to which every frame is resized and centre-cropped; an empty list keeps the
    clips' own size."""
    lpips: Url | Literal["none", "hub"] = "none"
    """Source of LPIPS's weights: the absolute URL of a folder with the published files vgg16-397923af.pth
    (torchvision) and vgg.pth (lpips 0.1), the word hub to download them once, or the word none to leave LPIPS
    out."""
    i3d: Url | None = None
    """Absolute URL of i3d_torchscript.pt for rFVD; null leaves rFVD out. Loading TorchScript runs the program
    in the file, so give only a file whose origin you trust."""
    workers: int = 1
    """Number of processes that measure, each one clip of one autoencoder at a time."""
    cpus: float = 1.0
    """CPU cores reserved for each measuring process."""
    gpus: float = 0.0
    """GPUs reserved for each measuring process; 0 works on the CPU."""
    decode_seconds: float = 60.0
    """Time limit in seconds for decoding one frame; a file that exceeds it becomes an error row."""
    shared_filesystem: bool = False
    """Set this to true if file:// URLs in this config name folders that every node mounts."""

    def __post_init__(self) -> None:
        check_urls(self)
        if not self.autoencoders:
            raise ValueError("autoencoders: empty; name at least one")
        for key in ("frames", "workers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")
        if self.size and (len(self.size) != 2 or min(self.size) < 16):
            raise ValueError(f"size: {self.size}; give [height, width], both at least 16, or nothing")
        check_perceptual(self.lpips, "lpips")
        if self.i3d is not None and self.frames < frechet.MIN_FRAMES:
            raise ValueError(
                f"frames: {self.frames}; rFVD needs at least {frechet.MIN_FRAMES} (or i3d: null)"
            )


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder, ours or another, behind one interface."""

    reconstruct: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    """uint8 (T, H, W, 3) -> the same shape"""
    about: dict[str, Any]
    """million parameters, compression of time (null for image models) and space, latent channels"""


def load(url: str, device: torch.device | str) -> Autoencoder:
    """Load the autoencoder at a URL, whichever kind it is. ValueError if it is none."""
    with tempfile.TemporaryDirectory() as folder:
        if url.endswith((".pth", ".pt", ".safetensors")):
            with storage.local_copy(url, folder) as path:
                return _ours(load_autoencoder(path).to(device))
        if not storage.exists(storage.join(url, CONFIG_FILE)):
            raise ValueError(
                f"{url}: no {CONFIG_FILE} here; give a weights folder, an ema_vae file or diffusers'"
            )
        if "sha256" in storage.read_json(storage.join(url, CONFIG_FILE)):
            return _ours(weights_folder.load_vae(url).to(device))
        return _theirs(DiffusersAutoencoder(_local_folder(url, folder), device))


def _ours(vae: CausalVideoAutoencoder) -> Autoencoder:
    config = vae.config

    def through(clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.concatenate(list(reconstruct(vae, clip, SLICE_FRAMES)))

    return Autoencoder(through, _about(vae, config.time_factor, config.space_factor, config.latent_channels))


def _theirs(other: DiffusersAutoencoder) -> Autoencoder:
    time_factor = other.time_factor if other.is_video else None
    about = _about(other.network, time_factor, other.space_factor, other.latent_channels)
    return Autoencoder(other.reconstruct, about)


def _about(network: torch.nn.Module, time: int | None, space: int, channels: int) -> dict[str, Any]:
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    return {
        "parameters_m": millions,
        "time_compression": time,
        "space_compression": space,
        "latent_channels": channels,
    }


def _local_folder(url: str, folder: str) -> Path:
    """The folder itself on a local disk, or a copy of its files in `folder`."""
    if url.startswith("file://"):
        return Path(storage.path_of(url))
    for file, _, _ in storage.list_files(url):
        with storage.local_copy(file, folder) as path:
            os.replace(path, os.path.join(folder, os.path.basename(file)))
    return Path(folder)


def plan_rows(config: EvaluateVaeConfig) -> list[dict[str, Any]]:
    """One row per autoencoder and clip, an autoencoder's rows together, so that few are loaded twice."""
    clips = media_files(config.clips)
    if not clips:
        raise ValueError(f"clips: no video and no image below {config.clips}")
    return [
        {"method": name, "autoencoder": url, "clip": clip, "url": clips[clip][0]}
        for name, url in config.autoencoders.items()
        for clip in sorted(clips)
    ]


def perceptual_distance(network: Lpips, made: NDArray[np.uint8], clip: NDArray[np.uint8]) -> float:
    """Mean LPIPS of the frames of two uint8 (T, H, W, 3) clips."""
    device = network.heads[0].device
    left, right = (torch.from_numpy(x).permute(0, 3, 1, 2).to(device) for x in (made, clip))
    pairs = zip(left.split(1), right.split(1), strict=True)  # a frame at a time: VGG16 is large
    with torch.inference_mode():
        return float(np.mean([network(a / 127.5 - 1, b / 127.5 - 1).item() for a, b in pairs]))


class Measure:
    """An actor: the scores and features of one clip through one autoencoder a call."""

    def __init__(self, config: EvaluateVaeConfig) -> None:
        torch.set_num_threads(max(1, int(config.cpus)))
        self.config = config
        self.device = torch.device("cuda" if config.gpus and torch.cuda.is_available() else "cpu")
        self.reader = Sandbox(config.decode_seconds)
        lpips = load_perceptual(config.lpips)
        self.lpips = lpips.to(self.device) if lpips else None
        self.loaded: tuple[str, Autoencoder] | None = None
        self.features: frechet.VideoFeatures | None = None
        if config.i3d is not None:
            with (
                tempfile.TemporaryDirectory() as folder,
                storage.local_copy(config.i3d, folder) as path,
            ):
                self.features = frechet.VideoFeatures(path, self.device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its scores, what is known of the autoencoder, and features, or with `error`."""
        result: dict[str, Any] = {**row, "frames": 0, "height": None, "width": None, "note": None}
        result |= dict.fromkeys(METRICS) | {"about": None, "features": None, "error": None}
        try:
            result |= self._scores(row)
        except (ValueError, OSError, RuntimeError) as error:
            result["error"] = f"{row['method']}: {row['url']}: {str(error).splitlines()[0]}"
        return {"result": result}

    def _scores(self, row: dict[str, Any]) -> dict[str, Any]:
        autoencoder = self._autoencoder(row["autoencoder"])
        clip = self._clip(row["url"])
        made = autoencoder.reconstruct(clip)
        per_frame: list[dict[str, float | None]] = []
        for left, right in zip(made, clip, strict=True):
            scores = full_reference_scores(left, right)
            per_frame.append({"psnr_rgb": scores["psnr_rgb"], "ssim_rgb": scores["ssim_rgb"]})
        frames, height, width, _ = clip.shape
        return {
            "frames": frames,
            "height": height,
            "width": width,
            "about": autoencoder.about,
            "lpips": perceptual_distance(self.lpips, made, clip) if self.lpips else None,
            "features": [self.features(x).tolist() for x in (clip, made)] if self.features else None,
            **summarise(per_frame),
        }

    def _autoencoder(self, url: str) -> Autoencoder:
        if self.loaded is None or self.loaded[0] != url:
            self.loaded = None  # memory need not hold two large ones at once
            self.loaded = (url, load(url, self.device))
        return self.loaded[1]

    def _clip(self, url: str) -> NDArray[np.uint8]:
        """uint8 (frames, H, W, 3), at the configured size."""
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
            stream = self.reader.stream(decoding.decode_frames, path, max_frames=self.config.frames)
            frames = [self._sized(frame) for frame in cast(Iterator[NDArray[np.uint8]], stream)]
        if len(frames) < self.config.frames:
            raise ValueError(f"it has {len(frames)} frames, `frames` asks for {self.config.frames}")
        return np.stack(frames)

    def _sized(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self.config.size:
            return frame
        height, width = self.config.size
        scale = max(height / frame.shape[0], width / frame.shape[1])
        resized = bicubic(
            frame, max(height, round(frame.shape[0] * scale)), max(width, round(frame.shape[1] * scale))
        )
        top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
        return resized[top : top + height, left : left + width]


def summarise_autoencoders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per autoencoder: what it is, means with standard errors, rFVD with its number of clips."""
    table = comparison_tables.means(rows, METRICS)
    for entry in table:
        good = [row for row in rows if row["method"] == entry["method"] and not row["error"]]
        features = [row["features"] for row in good if row["features"]]
        entry["about"] = good[0]["about"] if good else None
        entry["frames"] = sorted({row["frames"] for row in good})
        entry["sizes"] = sorted({f"{row['width']}x{row['height']}" for row in good})
        rfvd = None
        if len(features) >= 2:
            true, made = (np.asarray([pair[side] for pair in features]) for side in (0, 1))
            rfvd = frechet.frechet_distance(true, made)
        entry["rfvd"] = {"value": rfvd, "clips": len(features)}
    return table


def warnings(table: list[dict[str, Any]], config: EvaluateVaeConfig) -> list[str]:
    """Notes for a reader of the table, one line each."""
    lines = []
    few = sorted({entry["rfvd"]["clips"] for entry in table if entry["rfvd"]["clips"] < frechet.FEATURES})
    if config.i3d is not None and few:
        lines.append(
            f"rFVD of {few[0]} clips: under {frechet.FEATURES}, the covariance of as many features is "
            "rank-deficient and the distance too large; compare it only within this table"
        )
    if config.i3d is None:
        lines.append("no rFVD: `i3d` names no file")
    if config.lpips == "none":
        lines.append("no LPIPS: `lpips` is none")
    return lines


def markdown(table: list[dict[str, Any]], notes: list[str], config: EvaluateVaeConfig) -> str:
    """The layout of the paper's table 2, its own rows below ours."""
    head = [
        "autoencoder",
        "params (M)",
        "time",
        "space",
        "channels",
        *TITLES.values(),
        "clips",
        "frames",
        "size",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for entry in table:
        about = entry["about"] or {}
        millions = about.get("parameters_m")
        cells = [entry["method"], "–" if millions is None else f"{millions:.1f}"]
        cells += [
            _text(about.get(key)) for key in ("time_compression", "space_compression", "latent_channels")
        ]
        cells += [_value(entry[metric]["mean"], metric) for metric in METRICS]
        cells += [_value(entry["rfvd"]["value"], "rfvd"), str(entry["clips"])]
        cells += [", ".join(map(str, entry["frames"])) or "–", ", ".join(entry["sizes"]) or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    for printed in published.autoencoders():
        cells = [f"{printed['method']}, as printed in the paper", f"{printed['parameters_m']}"]
        cells += [_text(printed.get(key)) for key in _PAPERS_SHAPE]
        cells += [_value(printed[key], metric) for key, metric in zip(_PAPERS_METRICS, TITLES, strict=True)]
        lines.append("| " + " | ".join([*cells, "not given", "not given", "not given"]) + " |")
    sizes = f"{config.size[1]}x{config.size[0]}" if config.size else "their own size"
    lines += [
        "",
        f"Means over clips of the first {config.frames} frames at {sizes}; uint8 RGB; the mode of each",
    ]
    lines[-1] += " posterior, fp32. The paper names neither its clips nor their number, length and size."
    return "\n".join([*lines, *(f"\nNote: {note}." for note in notes)]) + "\n"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _value(value: float | None, metric: str) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{DECIMALS[metric]}f}"


def run(config: EvaluateVaeConfig) -> stage.Summary:
    """Measure every clip through every autoencoder; write the table and the summary."""
    planned = plan_rows(config)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.output, config.shared_filesystem, "output")
        dataset = ray.data.from_items(planned, override_num_blocks=len(planned)).map(
            cast(Any, Measure),  # Ray's types leave out callable classes
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(planned))),
            num_cpus=config.cpus,
            num_gpus=config.gpus,
        )
        dataset.set_name("evaluate vae")
        order = {name: index for index, name in enumerate(config.autoencoders)}
        rows = [item["result"] for item in dataset.take_all()]
        rows.sort(key=lambda row: (order[row["method"]], row["clip"]))
        table = summarise_autoencoders(rows)
        notes = warnings(table, config)
        for row in rows:
            row.pop("features")
        result = {"config": dataclasses.asdict(config), "autoencoders": table, "notes": notes, "clips": rows}
        storage.write_json(storage.join(config.output, f"{RESULTS}.json"), result)
        text = markdown(table, notes, config)
        storage.write_bytes(storage.join(config.output, f"{RESULTS}.md"), text.encode())
        print(text, flush=True)
        for row in rows:
            if row["error"]:
                print(f"not measured: {row['error']}", flush=True)
        summary.rows_in = len(rows)
        summary.errors = sum(1 for row in rows if row["error"])
        summary.rows_kept = len(rows) - summary.errors
        summary.details = {"autoencoders": table}

    return stage.run_stage("evaluate_vae", config.output, work)
