"""Restored videos, and the truth where there is one -> a table of metrics that says how it was measured.

PSNR and SSIM against the truth (`pipeline.scores.full_reference` holds the definition) and NIQE without it,
per clip and as mean with standard error, for any number of methods, each a folder of files named as the
truth's. The autoencoder's own reconstruction of the truth can be one more method: the ceiling of every
restoration that goes through it. Everything that changes a number stands in `evaluation.json` beside it.
"""

import dataclasses
import itertools
import math
import posixpath
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import ray
import torch
from torch import Tensor

from model import preprocess
from pipeline import evaluate_tables, media, stage, storage, weights
from pipeline.restore import IMAGE_ENDINGS, MANIFEST, VIDEO_ENDINGS
from pipeline.restorer import reconstruct
from pipeline.sandbox import Sandbox
from pipeline.scores import niqe
from pipeline.scores.full_reference import full_reference_scores

CEILING = "VAE(truth)"
FULL_REFERENCE = ("psnr_rgb", "psnr_y", "ssim_rgb", "ssim_y")
METRICS = (*FULL_REFERENCE, "niqe")
RESULTS = "evaluation"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What `jobs.evaluate` reads."""

    methods: dict[str, str]
    """name of each method: absolute URL of the folder with its results, named as the truth's files"""
    output: str
    """absolute URL of the folder for evaluation.json, evaluation.md and evaluation.html"""
    truth: str | None = None
    """absolute URL of the folder with the true videos and images (null: only metrics that need none)"""
    reconstruct_with: str | None = None
    """URL of autoencoder weights: what these make of the truth is one more method, the ceiling"""
    enlarge: list[str] = dataclasses.field(default_factory=list)
    """methods whose smaller frames are enlarged (bicubic) to the truth's size before they are measured"""
    every: int = 1
    """measure every n-th frame"""
    max_frames: int | None = None
    """measure at most so many frames of a clip (null: all)"""
    border_px: int = 0
    """pixels that are cut off at each side before PSNR and SSIM"""
    workers: int = 1
    """processes that measure, one clip of one method at a time"""
    cpus: float = 1.0
    """CPU cores reserved for each of them"""
    decode_seconds: float = 60.0
    """a file of which one frame takes longer to decode becomes an error row"""
    shared_filesystem: bool = False
    """set to true if file:// URLs here are on a folder that every node mounts"""

    def __post_init__(self) -> None:
        for key in ("output", "truth", "reconstruct_with"):
            if getattr(self, key) is not None:
                storage.check_url(getattr(self, key), key)
        for name, url in self.methods.items():
            storage.check_url(url, f"methods.{name}")
        if not self.methods and not self.reconstruct_with:
            raise ValueError("methods: empty; name at least one folder of results")
        if CEILING in self.methods:
            raise ValueError(f"methods: {CEILING!r} is the name of what reconstruct_with gives")
        if self.reconstruct_with and not self.truth:
            raise ValueError("reconstruct_with: there is nothing to reconstruct without `truth`")
        for key in ("every", "workers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")
        unknown = sorted(set(self.enlarge) - set(self.methods))
        if unknown:
            raise ValueError(f"enlarge: {unknown[0]!r} is none of the methods")


def media_files(url: str) -> dict[str, str]:
    """Videos and images below a folder: relative path without its ending -> URL. ValueError for two files
    of one name."""
    root = storage.check_url(url, "url")
    found: dict[str, str] = {}
    for file, _, _ in storage.list_files(root):
        name, ending = posixpath.splitext(file.removeprefix(root).lstrip("/"))
        if ending.lower() not in VIDEO_ENDINGS | IMAGE_ENDINGS:
            continue
        if name in found:
            raise ValueError(f"{file}: {found[name]} has the same name; which of them is to be measured?")
        found[name] = file
    return found


def plan_rows(config: EvaluateConfig) -> list[dict[str, Any]]:
    """One row per method and clip: {method, clip, url, truth}; a missing file is a row with `error`."""
    files = {name: media_files(url) for name, url in config.methods.items()}
    truth = media_files(config.truth) if config.truth else {}
    if config.truth and not truth:
        raise ValueError(f"truth: no video and no image below {config.truth}")
    clips = sorted(truth) if config.truth else sorted({clip for found in files.values() for clip in found})
    if not clips:
        raise ValueError("methods: none of these folders has a video or an image in it")
    rows = []
    for method, found in files.items():
        for clip in clips:
            row = {"method": method, "clip": clip, "url": found.get(clip), "truth": truth.get(clip)}
            missing = f"{method}: there is no {clip} below {config.methods[method]}"
            rows.append({**row, "error": None if row["url"] else missing})
    if config.reconstruct_with:
        rows += [
            {"method": CEILING, "clip": clip, "url": None, "truth": truth[clip], "error": None}
            for clip in clips
        ]
    return rows


class Measure:
    """An actor: scores of one clip of one method a call."""

    def __init__(self, config: EvaluateConfig) -> None:
        torch.set_num_threads(max(1, int(config.cpus)))
        self.config = config
        # One child per stream: the truth and the result are read at the same time.
        self.truth_reader, self.reader = Sandbox(config.decode_seconds), Sandbox(config.decode_seconds)
        self.vae = weights.load_vae(config.reconstruct_with) if config.reconstruct_with else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with frames, height, width and a value or null for each metric, or with `error`."""
        result = {**row, "frames": 0, "height": None, "width": None, "note": None}
        result |= dict.fromkeys(METRICS)
        if not row["error"]:
            try:
                result |= self._scores(row)
            except (ValueError, OSError) as error:
                result["error"] = f"{row['method']}: {row['url'] or row['truth']}: {error}"
        return {"result": result}

    def _scores(self, row: dict[str, Any]) -> dict[str, Any]:
        per_frame: list[dict[str, float | None]] = []
        shape: tuple[int, ...] = ()
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for index, (frame, truth) in enumerate(self._pairs(row, folder, stack)):
                limit = self.config.max_frames
                if limit is not None and len(per_frame) >= limit:
                    break
                if index % self.config.every == 0:
                    shape = frame.shape
                    per_frame.append(self._frame_scores(frame, truth))
        if not per_frame:
            raise ValueError("there is no frame in it")
        return {"frames": len(per_frame), "height": shape[0], "width": shape[1], **summarise(per_frame)}

    def _frame_scores(self, frame: np.ndarray, truth: np.ndarray | None) -> dict[str, float | None]:
        scores: dict[str, float | None] = {"niqe": niqe_or_none(frame)}
        if truth is not None:
            scores |= full_reference_scores(frame, truth, self.config.border_px)
        return scores

    def _pairs(
        self, row: dict[str, Any], folder: str, stack: ExitStack
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(measured frame, true frame or None); ValueError where the two do not match."""
        truth_path = stack.enter_context(storage.local_copy(row["truth"], folder)) if row["truth"] else None
        if row["url"] is None:
            assert truth_path is not None
            yield from self._reconstructed(truth_path)
            return
        path = stack.enter_context(storage.local_copy(row["url"], folder))
        frames = self.reader.stream(media.decode_frames, path)
        if truth_path is None:
            yield from ((frame, None) for frame in frames)
            return
        truths = self.truth_reader.stream(media.decode_frames, truth_path)
        enlarge = row["method"] in self.config.enlarge
        for index, (frame, truth) in enumerate(itertools.zip_longest(frames, truths)):
            if frame is None or truth is None:
                fewer, more = ("it has", "the truth has") if frame is None else ("the truth has", "it has")
                raise ValueError(f"{fewer} {index} frames, {more} more")
            if enlarge:
                frame = bicubic(frame, truth.shape[0], truth.shape[1])
            if frame.shape != truth.shape:
                sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in (frame, truth)]
                raise ValueError(f"frame {index} is {sizes[0]}, the truth's is {sizes[1]}")
            yield frame, truth

    def _reconstructed(self, truth_path: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        assert self.vae is not None
        waiting: deque[np.ndarray] = deque()

        def truths() -> Iterator[np.ndarray]:
            for frame in self.truth_reader.stream(media.decode_frames, truth_path):
                waiting.append(frame)
                yield frame

        for frames in reconstruct(self.vae, truths()):
            yield from ((frame, waiting.popleft()) for frame in frames)


def bicubic(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A uint8 (H, W, 3) frame at another size, resized as restore resizes its input."""
    pixels: Tensor = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    resized = preprocess.resize(pixels, height, width)
    return (resized[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def niqe_or_none(frame: np.ndarray) -> float | None:
    """NIQE of a frame; None where the frame is too small or too flat for it."""
    value = niqe.niqe(frame)
    return None if value is None or not math.isfinite(value) else value


def summarise(per_frame: list[dict[str, float | None]]) -> dict[str, Any]:
    """Means over a clip's frames. A frame equal to the truth has infinite PSNR, which JSON cannot hold: then
    PSNR is null and `note` says so."""
    result: dict[str, Any] = {"note": None}
    for metric in per_frame[0]:
        values = [scores[metric] for scores in per_frame]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        equal = sum(1 for value in values if value == math.inf)
        if equal:
            result["note"] = f"{equal} of {len(values)} frames equal the truth: infinite PSNR"
        result[metric] = None if equal or not finite else sum(finite) / len(finite)
    return result


def protocol(config: EvaluateConfig) -> dict[str, Any]:
    """How the numbers were made."""
    about: dict[str, Any] = {
        "truth": config.truth,
        "methods": {name: {"url": url, **models_of(url)} for name, url in config.methods.items()},
        "frames": {"every": config.every, "max_frames": config.max_frames},
        "border_px": config.border_px,
        "range": "uint8, 0 to 255",
        "psnr": "mean over frames of 10 log10(255^2 / MSE); rgb: all channels; y: BT.601 luma, 16 to 235",
        "ssim": "Gaussian window 11, sigma 1.5, valid positions; rgb: mean of the channels",
        "niqe": "on luma, mean over frames, lower is better",
        "enlarged (bicubic)": config.enlarge,
    }
    if config.reconstruct_with:
        about["methods"][CEILING] = {
            "url": config.reconstruct_with,
            "vae_sha256": [weights.weights_hash(config.reconstruct_with)],
        }
    return about


def models_of(url: str) -> dict[str, list[str]]:
    """The hashes of the models that made a folder, where restore's manifest is there."""
    manifest = storage.join(storage.check_url(url, "methods"), MANIFEST)
    rows = storage.read_json(manifest) if storage.exists(manifest) else []
    found: dict[str, list[str]] = {}
    for key in ("vae_sha256", "dit_sha256"):
        hashes = {row[key] for row in rows if isinstance(row, dict) and row.get(key)}
        if hashes:
            found[key] = sorted(hashes)
    return found


def run(config: EvaluateConfig) -> stage.Summary:
    """Measure every clip of every method; write the tables and the summary."""
    planned = plan_rows(config)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.output, config.shared_filesystem, "output")
        dataset = ray.data.from_items(planned, override_num_blocks=len(planned)).map(
            cast(Any, Measure),  # Ray's types leave out callable classes
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(planned))),
            num_cpus=config.cpus,
        )
        dataset.set_name("evaluate")
        rows = sorted(
            (item["result"] for item in dataset.take_all()), key=lambda row: (row["method"], row["clip"])
        )
        means = evaluate_tables.means(rows, METRICS)
        result = {"protocol": protocol(config), "means": means, "clips": rows}
        storage.write_json(storage.join(config.output, f"{RESULTS}.json"), result)
        for ending, text in (
            ("md", evaluate_tables.markdown(result, METRICS, CEILING)),
            ("html", evaluate_tables.html_page(result, METRICS, CEILING)),
        ):
            storage.write_bytes(storage.join(config.output, f"{RESULTS}.{ending}"), text.encode())
        print(evaluate_tables.markdown_means(means, METRICS, CEILING), flush=True)
        for row in rows:
            if row["error"]:
                print(f"not measured: {row['error']}", flush=True)
        summary.rows_in = len(rows)
        summary.errors = sum(1 for row in rows if row["error"])
        summary.rows_kept = len(rows) - summary.errors
        summary.details = {"metrics": means}

    return stage.run_stage("evaluate", config.output, work)
