"""Metrics of restored videos, with or without the truth, in tables that state how they were measured.

PSNR, SSIM, LPIPS and DISTS compare with the truth; NIQE, MUSIQ, CLIP-IQA, DOVER and the warping error need
none. They are reported per clip and as means with standard errors, for any number of methods, each a folder
of files named like the truth's. Metrics that are networks (`pipeline.metrics.metric_networks`) need weights
and are left out without. The autoencoder's own reconstruction of the truth can be one more method: the
ceiling of every restoration that goes through it. `evaluation.json` records everything that changes a number.
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
from pipeline.evaluation import benchmark_sets, comparison_tables, peers, published
from pipeline.metrics import metric_table
from pipeline.metrics.metric_networks import LearnedMetrics, Networks
from pipeline.restoration.restore import MANIFEST
from pipeline.restoration.vae_reconstruction import reconstruct
from pipeline.runtime import stage
from pipeline.store import storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding
from pipeline.video.file_endings import IMAGE_ENDINGS, MEDIA_ENDINGS, ending_of, natural_order
from pipeline.video.sandbox import Sandbox
from pipeline.weights import weights_folder

CEILING = "VAE(truth)"
METRICS = metric_table.WITHOUT_WEIGHTS
RESULTS = "evaluation"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What `jobs.evaluate` reads."""

    methods: dict[str, Url]
    """Methods to compare: each name with the absolute URL of the folder that holds its results, which are
    named like the files of `truth`."""
    output: Url
    """Absolute URL of the folder to which evaluation.json, evaluation.md and evaluation.html are written."""
    truth: Url | None = None
    """Absolute URL of the folder with the true videos and images; null measures only what needs no truth."""
    reconstruct_with: Url | None = None
    """URL of autoencoder weights whose reconstruction of the truth is measured as one more method: the
    ceiling of every restoration that goes through that autoencoder. Null measures none."""
    sequences: bool = False
    """Whether a folder of images is one clip, made of the images in the order of their names."""
    benchmark: str | None = None
    """Name of a test set in configs/sets.yaml, which is checked for completeness and whose published numbers
    are printed next to the measured ones; null compares with none."""
    enlarge: list[str] = dataclasses.field(default_factory=list)
    """Methods whose smaller frames are first enlarged (bicubic) to the truth's size."""
    every: int = 1
    """Distance between measured frames: 1 measures every frame, n every n-th."""
    max_frames: int | None = None
    """Largest number of frames measured in a clip; null measures all."""
    border_px: int = 0
    """Pixels cut off at every side before PSNR and SSIM are measured."""
    learned: LearnedMetrics = dataclasses.field(default_factory=LearnedMetrics)
    """Weights of LPIPS, DISTS, MUSIQ, CLIP-IQA and DOVER; metrics without weights are left out."""
    workers: int = 1
    """Number of processes that measure, each one clip of one method at a time."""
    cpus: float = 1.0
    """CPU cores reserved for each measuring process."""
    gpus: float = 0.0
    """GPUs reserved for each measuring process, for learned metrics and the autoencoder; 0 uses the CPU."""
    decode_seconds: float = 60.0
    """Time limit in seconds for decoding one frame; a file that exceeds it becomes an error row."""
    shared_filesystem: bool = False
    """Set this to true if file:// URLs in this config name folders that every node mounts."""

    def __post_init__(self) -> None:
        check_urls(self)
        if not self.methods and not self.reconstruct_with:
            raise ValueError("methods: empty; name at least one folder of results")
        if CEILING in self.methods:
            raise ValueError(f"methods: {CEILING!r} is the name of what reconstruct_with gives")
        if self.benchmark is not None:
            benchmark_sets.load(self.benchmark)
        if self.reconstruct_with and not self.truth:
            raise ValueError("reconstruct_with: there is nothing to reconstruct without `truth`")
        for key in ("every", "workers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; it must be at least 1")
        unknown = sorted(set(self.enlarge) - set(self.methods))
        if unknown:
            raise ValueError(f"enlarge: {unknown[0]!r} is none of the methods")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns of the tables, in their order."""
        learned = self.learned.columns(bool(self.truth))
        table = metric_table.METRICS.items()
        return tuple(name for name, metric in table if metric.weights is None or name in learned)


def media_files(url: str, sequences: bool = False) -> dict[str, list[str]]:
    """Videos and images below a folder, as relative path without its ending -> list of URLs.

    Each list has one URL, or with `sequences` all images of a folder in the order of their names. Folders
    whose name begins with "_" are bookkeeping. Raises ValueError for two files of one name.
    """
    found: dict[str, list[str]] = {}
    for file, _, _ in storage.list_files(url):
        inner = file.removeprefix(url).lstrip("/")
        name, ending = posixpath.splitext(inner)[0], ending_of(inner)
        bookkeeping = any(part.startswith("_") for part in inner.split("/")[:-1])
        if bookkeeping or ending not in MEDIA_ENDINGS:
            continue
        folder = posixpath.dirname(inner)
        if sequences and folder and ending in IMAGE_ENDINGS:
            found.setdefault(folder, []).append(file)
        elif name in found:
            raise ValueError(f"{file}: {found[name][0]} has the same name; which of them is to be measured?")
        else:
            found[name] = [file]
    return {name: sorted(files, key=natural_order) for name, files in found.items()}


def plan_rows(config: EvaluateConfig) -> list[dict[str, Any]]:
    """One row per method and clip: {method, clip, url, truth}, the last two lists of URLs or None.

    A missing file gives a row with `error`.
    """
    files = {name: media_files(url, config.sequences) for name, url in config.methods.items()}
    truth = media_files(config.truth, config.sequences) if config.truth else {}
    if config.truth and not truth:
        raise ValueError(f"truth: no video and no image below {config.truth}")
    clips = sorted(truth) if config.truth else sorted({clip for found in files.values() for clip in found})
    if not clips:
        raise ValueError("methods: none of these folders has a video or an image in it")
    if config.benchmark is not None:
        benchmark_sets.check(config.benchmark, len(clips), bool(config.truth))
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
        device = torch.device("cuda" if config.gpus and torch.cuda.is_available() else "cpu")
        vae = config.reconstruct_with
        self.vae = weights_folder.load_vae(vae).to(device) if vae is not None else None
        self.networks = Networks(config.learned, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with frames, height, width and a value or null for each metric, or with `error`."""
        result = {**row, "frames": 0, "height": None, "width": None, "note": None}
        result |= dict.fromkeys(self.config.metrics)
        if not row["error"]:
            try:
                result |= self._scores(row)
            except (ValueError, OSError) as error:
                result["error"] = f"{row['method']}: {place(row['url'] or row['truth'])}: {error}"
        return {"result": result}

    def _scores(self, row: dict[str, Any]) -> dict[str, Any]:
        per_frame: list[dict[str, float | None]] = []
        shape: tuple[int, ...] = ()
        before: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            learned = self.networks.clip(self._measured_frames(row, folder))
            for index, (frame, truth) in enumerate(self._pairs(row, folder, stack)):
                limit = self.config.max_frames
                if limit is not None and len(per_frame) >= limit:
                    break
                if index % self.config.every == 0:
                    shape = frame.shape
                    pair = metric_table.FramePair(frame, truth, *before, self.config.border_px)
                    per_frame.append(metric_table.frame_scores(pair))
                    learned.push(frame, truth)
                before = (frame, truth)
        if not per_frame:
            raise ValueError("it has no frames")
        size = {"frames": len(per_frame), "height": shape[0], "width": shape[1]}
        return {**size, **summarise(per_frame), **learned.finish()}

    def _measured_frames(self, row: dict[str, Any], folder: str) -> int:
        """Number of frames of a clip to measure; counted only for DOVER, which alone has to know it."""
        if self.networks.dover is None:
            return 0
        with ExitStack() as stack:
            urls = row["url"] or row["truth"]
            count = len(urls)
            if count == 1:
                count = sum(1 for _ in read(self.reader, urls, folder, stack, max_side=64))
        count = -(-count // self.config.every)
        return count if self.config.max_frames is None else min(count, self.config.max_frames)

    def _pairs(
        self, row: dict[str, Any], folder: str, stack: ExitStack
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(measured frame, true frame or None); ValueError where the two do not match."""
        truths = read(self.truth_reader, row["truth"], folder, stack) if row["truth"] else None
        if row["url"] is None:
            assert truths is not None
            yield from self._reconstructed(truths)
            return
        frames = read(self.reader, row["url"], folder, stack)
        if truths is None:
            yield from ((frame, None) for frame in frames)
            return
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

    def _reconstructed(self, truths: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        assert self.vae is not None
        waiting: deque[np.ndarray] = deque()

        def kept() -> Iterator[np.ndarray]:
            for frame in truths:
                waiting.append(frame)
                yield frame

        for frames in reconstruct(self.vae, kept()):
            yield from ((frame, waiting.popleft()) for frame in frames)


def read(
    reader: Sandbox, urls: list[str], folder: str, stack: ExitStack, max_side: int | None = None
) -> Iterator[np.ndarray]:
    """The frames of a file (shrunk to `max_side`) or of image files; ValueError names the image."""
    if len(urls) == 1:
        path = stack.enter_context(storage.local_copy(urls[0], folder))
        yield from reader.stream(decoding.decode_frames, path, max_side=max_side)
        return
    for url in urls:
        with storage.local_copy(url, folder) as path:
            try:
                picture = reader.call(decoding.load_image, path)
            except ValueError as error:
                raise ValueError(f"{posixpath.basename(url)}: {error}") from None
        yield picture


def place(urls: list[str]) -> str:
    """A file, or the folder of a sequence."""
    return urls[0] if len(urls) == 1 else posixpath.dirname(urls[0])


def bicubic(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A uint8 (H, W, 3) frame at another size, resized as restore resizes its input."""
    pixels: Tensor = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    resized = preprocess.resize(pixels, height, width)
    return (resized[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def summarise(per_frame: list[dict[str, float | None]]) -> dict[str, Any]:
    """Means over a clip's frames.

    A frame equal to the truth has infinite PSNR, which JSON cannot hold; PSNR is then null and `note` says
    so.
    """
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
        "warping error": "1000 x mean squared difference of neighbouring frames along DIS flow (of the truth "
        "where there is one), visible pixels, lower is better",
        "lpips, dists, musiq, clip-iqa": "RGB, whole frames without the border cut, mean over frames",
        "dover": "whole video of the measured frames; technical score x100 and fused score in 0 to 1",
        "weights": config.learned.hashes(),
        "left out": config.learned.left_out(bool(config.truth)),
        "benchmark": config.benchmark,
        "enlarged (bicubic)": config.enlarge,
    }
    if config.reconstruct_with:
        about["methods"][CEILING] = {
            "url": config.reconstruct_with,
            "vae_sha256": [weights_folder.weights_hash(config.reconstruct_with)],
        }
    return about


def models_of(url: str) -> dict[str, list[str]]:
    """The hashes of the models that made a folder, where restore's manifest is there."""
    manifest = storage.join(url, MANIFEST)
    rows = storage.read_json(manifest) if storage.exists(manifest) else []
    found: dict[str, list[str]] = {}
    for key in ("vae_sha256", "dit_sha256"):
        hashes = {row[key] for row in rows if isinstance(row, dict) and row.get(key)}
        if hashes:
            found[key] = sorted(hashes)
    return found


def tables(config: EvaluateConfig, result: dict[str, Any]) -> dict[str, str]:
    """File ending: text. Of a known benchmark the LaTeX and the Markdown show the published rows too."""
    texts = {
        "md": comparison_tables.markdown(result, config.metrics, CEILING),
        "html": comparison_tables.evaluation_page(result, config.metrics, CEILING),
        "tex": comparison_tables.latex_means(result["means"], config.metrics, CEILING),
    }
    if config.benchmark is not None:
        columns = tuple(dict.fromkeys([*published.METRICS, *config.metrics]))
        means = [{**dict.fromkeys(columns, comparison_tables.NOTHING), **row} for row in result["means"]]
        beside = [*published.rows_of(config.benchmark, columns), *means]
        heading = f"\n## Beside the SeedVR paper's table 1, {config.benchmark}\n\n"
        texts["md"] += heading + comparison_tables.markdown_means(beside, columns, CEILING) + "\n"
        texts["tex"] = comparison_tables.latex_means(beside, columns, CEILING)
        page = comparison_tables.html_means(beside, columns, CEILING)
        texts["html"] = texts["html"].replace("</html>", f"<h2>Beside the paper</h2>{page}</html>")
    return texts


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
            num_gpus=config.gpus,
        )
        dataset.set_name("evaluate")
        rows = sorted(
            (item["result"] for item in dataset.take_all()), key=lambda row: (row["method"], row["clip"])
        )
        means = comparison_tables.means(rows, config.metrics)
        costs = {name: peers.cost_of(url) for name, url in config.methods.items()}
        result = {"protocol": protocol(config), "means": means, "clips": rows, "costs": costs}
        storage.write_json(storage.join(config.output, f"{RESULTS}.json"), result)
        for ending, text in tables(config, result).items():
            storage.write_bytes(storage.join(config.output, f"{RESULTS}.{ending}"), text.encode())
        print(comparison_tables.markdown_means(means, config.metrics, CEILING), flush=True)
        if left_out := config.learned.left_out(bool(config.truth)):
            print(left_out, flush=True)
        for row in rows:
            if row["error"]:
                print(f"not measured: {row['error']}", flush=True)
        summary.rows_in = len(rows)
        summary.errors = sum(1 for row in rows if row["error"])
        summary.rows_kept = len(rows) - summary.errors
        summary.details = {"metrics": means}

    return stage.run_stage("evaluate", config.output, work)
