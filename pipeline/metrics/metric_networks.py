"""The learned metrics of `jobs.evaluate`: networks whose published weights the config names.

LPIPS and DISTS compare a frame with the true one and MUSIQ and CLIP-IQA judge a frame alone, all in batches
and averaged over frames; DOVER judges a whole video. A metric without weights is left out, and the result
says so.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from model import checkpoints
from pipeline.metrics.metric_table import METRICS
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.weights import weight_hashes
from pipeline.weights.lpips_weights import HEADS_FILE, VGG_FILE, check_perceptual, load_perceptual

DISTS_FILE = "weights.pt"
BATCH_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class LearnedMetrics:
    """Where the weights of the learned metrics are (null: the column is left out)."""

    lpips: Url | Literal["hub"] | None = None
    """Source of LPIPS's weights: the absolute URL of a folder with the published files vgg16-397923af.pth
    (torchvision) and vgg.pth (lpips 0.1), or the word hub to download them once; null leaves LPIPS out."""
    dists: Url | None = None
    """Absolute URL of a folder with vgg16-397923af.pth and DISTS_pytorch's weights.pt; null leaves DISTS
    out."""
    musiq: Url | None = None
    """Absolute URL of one of Google's MUSIQ .npz files (koniq_ckpt.npz); null leaves MUSIQ out."""
    clip_iqa: str | None = None
    """CLIP RN50 for CLIP-IQA: a Hugging Face id (timm/resnet50_clip.openai) or an absolute folder that every
    node has; null leaves CLIP-IQA out."""
    dover: Url | None = None
    """Absolute URL of DOVER.pth, whose licence forbids commercial use; null leaves DOVER out."""

    def __post_init__(self) -> None:
        check_urls(self, "learned.")
        if self.lpips is not None:
            check_perceptual(self.lpips, "learned.lpips")
        if self.dists is not None:
            for name in (VGG_FILE, DISTS_FILE):
                if not storage.exists(storage.join(self.dists, name)):
                    raise ValueError(f"learned.dists: {self.dists} has no {name}")
        for key in ("musiq", "dover"):
            url = getattr(self, key)
            if url is not None and not storage.exists(url):
                raise ValueError(f"learned.{key}: there is no file {url}")

    @property
    def names(self) -> list[str]:
        """The metrics that have weights."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def columns(self, has_truth: bool) -> tuple[str, ...]:
        """The columns that these give."""
        return tuple(
            metric.name
            for metric in METRICS.values()
            if metric.weights in self.names and (has_truth or not metric.needs_truth)
        )

    def left_out(self, has_truth: bool) -> str | None:
        """One line on which metrics are not measured and why; None if all are."""
        lacking = [field.name for field in dataclasses.fields(self) if field.name not in self.names]
        reasons = [f"no weights for {', '.join(lacking)} (learned.{lacking[0]}, ...)"] if lacking else []
        needing = {metric.weights for metric in METRICS.values() if metric.needs_truth}
        without = [name for name in self.names if name in needing and not has_truth]
        reasons += [f"no truth for {', '.join(without)}"] if without else []
        return "left out: " + "; ".join(reasons) if reasons else None

    def hashes(self) -> dict[str, dict[str, str]]:
        """The origin of each metric's weights and their sha256 (for a hub model, its commit)."""
        found: dict[str, dict[str, str]] = {}
        for name in self.names:
            source = str(getattr(self, name))
            if name == "clip_iqa":
                found[name] = {
                    "weights": source,
                    "sha256": weight_hashes.clip_hash(source, "learned.clip_iqa"),
                }
            elif source != "hub":
                files = {"lpips": (VGG_FILE, HEADS_FILE), "dists": (VGG_FILE, DISTS_FILE)}.get(name, ("",))
                urls = [storage.join(source, file) if file else source for file in files]
                found[name] = {"weights": source, "sha256": " ".join(map(weight_hashes.file_hash, urls))}
            else:
                found[name] = {"weights": source, "sha256": "checked on download"}
        return found


PerFrame = Callable[[Tensor, Tensor | None], list[float]]
"""Maps uint8 (B, H, W, 3) frames, and the true ones, to one value per frame."""


class Networks:
    """The configured networks, loaded once; `clip` measures one clip."""

    def __init__(self, config: LearnedMetrics, device: torch.device) -> None:
        self.device = device
        self.per_frame: dict[str, PerFrame] = {}
        self.dover: Any = None
        if config.lpips is not None:
            lpips = load_perceptual(config.lpips)
            assert lpips is not None
            self.per_frame["lpips"] = self._compared(lpips, lambda x: x / 127.5 - 1)
        if config.dists is not None:
            self.per_frame["dists"] = self._compared(load_dists(config.dists), lambda x: x / 255)
        if config.musiq is not None:
            musiq = load(config.musiq, checkpoints.load_musiq).to(device)
            self.per_frame["musiq"] = lambda frames, _: musiq.scores(frames)
        if config.clip_iqa is not None:
            from model.quality.clip_iqa import ClipIQA  # open_clip takes seconds to import

            clip = checkpoints.load_clip(config.clip_iqa).to(device=device, dtype=torch.float32)
            clip_iqa = ClipIQA(clip)
            self.per_frame["clip_iqa"] = lambda frames, _: clip_iqa.scores(frames)
        if config.dover is not None:
            self.dover = load(config.dover, checkpoints.load_dover).to(device)

    def _compared(self, network: nn.Module, scaled: Callable[[Tensor], Tensor]) -> PerFrame:
        network.to(self.device)

        @torch.inference_mode()
        def distance(frames: Tensor, truths: Tensor | None) -> list[float]:
            assert truths is not None
            left, right = (scaled(x.permute(0, 3, 1, 2).to(self.device).float()) for x in (frames, truths))
            return network(left, right).tolist()

        return distance

    @property
    def any(self) -> bool:
        """Whether any network is configured."""
        return bool(self.per_frame) or self.dover is not None

    def clip(self, total: int) -> "Clip":
        """A measurement of a clip of `total` measured frames."""
        return Clip(self, total)


class Clip:
    """Takes a clip's measured frames one by one; holds a batch of them and what DOVER needs."""

    def __init__(self, networks: Networks, total: int) -> None:
        self.networks = networks
        self.values: dict[str, list[float]] = {name: [] for name in networks.per_frame}
        self._waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._dover = networks.dover if total > 1 else None  # DOVER does not score images
        self._wanted: tuple[list[int], list[int]] = ([], [])
        if self._dover is not None:
            self._wanted = self._dover.frame_numbers(total)
        self._looks: dict[int, tuple[Tensor, Tensor]] = {}
        self._count = 0

    def push(self, frame: np.ndarray, truth: np.ndarray | None) -> None:
        """A uint8 (H, W, 3) frame and the true one. ValueError if a network cannot use it."""
        if self._dover is not None and self._count in {*self._wanted[0], *self._wanted[1]}:
            self._looks[self._count] = self._dover.look(torch.from_numpy(frame))
        self._count += 1
        self._waiting.append((frame, truth))
        if len(self._waiting) == BATCH_FRAMES:
            self._measure()

    def _measure(self) -> None:
        frames = torch.from_numpy(np.stack([frame for frame, _ in self._waiting]))
        truths = [truth for _, truth in self._waiting if truth is not None]
        true = torch.from_numpy(np.stack(truths)) if truths else None
        self._waiting = []
        for name, measure in self.networks.per_frame.items():
            if true is not None or not METRICS[name].needs_truth:
                self.values[name] += measure(frames, true)

    def finish(self) -> dict[str, float | None]:
        """The clip's columns: means over the frames, and DOVER's two numbers."""
        if self._waiting:
            self._measure()
        result: dict[str, float | None] = {
            name: float(np.mean(values)) if values else None for name, values in self.values.items()
        }
        if self._dover is not None:
            technical, whole = self._wanted
            scores = self._dover.score(
                torch.cat([self._looks[number][0] for number in technical], dim=1),
                torch.cat([self._looks[number][1] for number in whole], dim=1),
            )
            result["dover_technical_x100"] = 100 * scores["technical"]
            result["dover_overall"] = scores["overall"]
        return result


def load(url: str, read: Callable[[str], Any]) -> Any:
    """A network from a file at a URL, in fp32."""
    with tempfile.TemporaryDirectory() as folder, storage.local_copy(url, folder) as path:
        return read(path).to(dtype=torch.float32).requires_grad_(False)


def load_dists(url: str) -> nn.Module:
    """DISTS from the folder of its two files."""

    def table(name: str) -> dict[str, Tensor]:
        file = storage.join(url, name)
        with tempfile.TemporaryDirectory() as folder, storage.local_copy(file, folder) as path:
            return checkpoints.read_tensors(path)

    return checkpoints.build_dists(table(VGG_FILE), table(DISTS_FILE), url)
