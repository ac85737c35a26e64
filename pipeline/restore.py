"""Any video or image -> the restored one: the same frames, time stamps, sound, a `manifest.json` beside.

One file is one task of an actor that holds the models. A finished file leaves a row in `_manifest/`, so
that a run that was killed goes on with the files that are missing; a file that cannot be read becomes a
row with `error` and never ends the job. From Python: `from pipeline.restore import Restorer`.
"""

import dataclasses
import io
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import ray
import torch
from PIL import Image
from safetensors.torch import load as from_safetensors

from pipeline import container, encoding, media, schema, stage, storage, weights
from pipeline.restorer import STEPS_OF_WORK, Prompt, Restorer, Sampling
from pipeline.sandbox import Sandbox

__all__ = ["RestoreConfig", "Restorer", "Sampling", "run"]

MANIFEST = "manifest.json"
_ROWS = "_manifest"
VIDEO_ENDINGS = frozenset({
    ".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".ogv", ".mxf",
    ".y4m", ".gif",
})  # fmt: skip
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
_MAX_SIDE_PX = 16384


@dataclasses.dataclass(frozen=True)
class RestoreConfig:
    """What `jobs.restore` reads."""

    input: str | list[str]
    """absolute URL of a file or a folder (every video and image below), or a list of them"""
    output: str
    """absolute URL of the folder for the results, which keep their path relative to their input folder"""
    vae: str
    """URL of a folder of trained autoencoder weights"""
    dit: str
    """URL of a folder of trained transformer weights"""
    scale: float | None = None
    """enlarge by this factor (null: keep the size); at most one of scale, short_side and size"""
    short_side: int | None = None
    """enlarge or shrink so that the shorter side has this many pixels"""
    size: tuple[int, int] | None = None
    """height and width of the result in pixels, whatever the input's aspect"""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """steps, guidance, noise, colours and chunks"""
    prompt: str | None = None
    """URL of a .safetensors file with the positive prompt's `text` and `pooled`, for guidance"""
    container: Literal["mp4", "mkv"] = "mp4"
    """of videos; sound that mp4 cannot hold moves that video to mkv"""
    lossless: bool = False
    """FFV1 in mkv instead of H.264: for measuring rather than for watching"""
    crf: int = 16
    """H.264's constant rate factor: lower is larger and better"""
    actors: int = 1
    """processes that restore, each with its own copy of the models"""
    cpus: float = 1.0
    """CPU cores reserved for each of them"""
    gpus: float = 0.0
    """GPUs reserved for each of them"""
    decode_seconds: float = 60.0
    """a file of which one frame takes longer to decode becomes an error row"""
    shared_filesystem: bool = False
    """set to true if file:// URLs here are on a folder that every node mounts"""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("input: empty; give at least one file or folder")
        for key in ("output", "vae", "dit"):
            storage.check_url(getattr(self, key), key)
        if self.prompt is not None:
            storage.check_url(self.prompt, "prompt")
        elif self.sampling.guidance_scale != 1:
            raise ValueError("sampling.guidance_scale: guidance needs `prompt`, a file of text embeddings")
        if sum(target is not None for target in (self.scale, self.short_side, self.size)) > 1:
            raise ValueError("scale, short_side, size: give at most one of them")
        if self.actors < 1:
            raise ValueError(f"actors: {self.actors}; it must be at least 1")

    @property
    def inputs(self) -> list[str]:
        """The input URLs, checked."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [storage.check_url(url, "input") for url in given]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result for an input of this size. ValueError if it makes no sense."""
        if self.size is not None:
            result = self.size
        else:
            factor = self.scale or 1.0
            if self.short_side is not None:
                factor = self.short_side / min(height, width)
            result = round(height * factor), round(width * factor)
        if min(result) < 1 or max(result) > _MAX_SIDE_PX:
            raise ValueError(f"{width}x{height} would become {result[1]}x{result[0]} pixels")
        return result


def list_inputs(config: RestoreConfig) -> list[dict[str, Any]]:
    """One row per file: input URL, its bytes and etag, and `name`, the result's path without its ending.

    Two inputs whose results would share a name keep their own ending in it (`a.mov.mp4`).
    """
    rows: dict[str, dict[str, Any]] = {}
    for root in config.inputs:
        files = storage.list_files(root)
        if not files:
            raise ValueError(f"input: {root} is no file and no folder with files in it")
        for url, size, etag in files:
            alone = url == root
            inner = posixpath.basename(url) if alone else url.removeprefix(root).lstrip("/")
            ending = posixpath.splitext(inner)[1].lower()
            if alone or ending in VIDEO_ENDINGS | IMAGE_ENDINGS:
                rows[url] = {"input": url, "bytes": size, "etag": etag, "name": inner}
    stems = [posixpath.splitext(row["name"])[0] for row in rows.values()]
    for row, stem in zip(rows.values(), stems, strict=True):
        row["name"] = stem if stems.count(stem) == 1 else row["name"]
    names = [row["name"] for row in rows.values()]
    twice = next((row for row in rows.values() if names.count(row["name"]) > 1), None)
    if twice is not None:
        raise ValueError(f"input: two files would be written to {twice['name']}; restore them separately")
    return list(rows.values())


def row_url(config: RestoreConfig, row: dict[str, Any]) -> str:
    """Where the manifest row of a finished file is kept."""
    return storage.join(config.output, _ROWS, f"{schema.stable_id(row['name'])}.json")


def fingerprint(config: RestoreConfig, row: dict[str, Any]) -> str:
    """Of everything that determines a result: a file is done only if it was made in this very way."""
    return schema.fingerprint(
        source=(row["input"], row["bytes"], row["etag"]),
        models=(weights.weights_hash(config.vae), weights.weights_hash(config.dit)),
        prompt=config.prompt,
        sampling=dataclasses.asdict(config.sampling),
        size=(config.scale, config.short_side, config.size),
        encoding=(config.container, config.lossless, config.crf),
    )


def finished(config: RestoreConfig, row: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest row of a file that an earlier run has restored in the same way, if its result is there."""
    url = row_url(config, row)
    if not storage.exists(url):
        return None
    found = storage.read_json(url)
    same = found["fingerprint"] == row["fingerprint"] and not found["error"]
    return found if same and storage.exists(found["output"]) else None


class RestoreActor:
    """Loads the models once, restores one file per call."""

    def __init__(self, config: RestoreConfig) -> None:
        self.config = config
        device = "cuda" if config.gpus and torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(max(1, int(config.cpus)))
        prompt = load_prompt(config.prompt) if config.prompt else None
        self.restorer = Restorer.from_weights(config.vae, config.dit, config.sampling, prompt, device)
        self.sandbox = Sandbox(config.decode_seconds)
        self.models = {
            "vae_sha256": weights.weights_hash(config.vae),
            "dit_sha256": weights.weights_hash(config.dit),
        }

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The file's manifest row, which is also written, whatever happens to the file."""
        start = time.monotonic()
        result = {**row, **self.models, "seed": self.config.sampling.seed, "error": None}
        try:
            with tempfile.TemporaryDirectory() as folder:
                result |= restore_file(self.restorer, self.sandbox, self.config, row, folder)
        except (ValueError, OSError) as error:
            result |= {"error": f"{row['input']}: {error}"}
        result["seconds"] = round(time.monotonic() - start, 3)
        storage.write_json(row_url(self.config, row), result)
        return {"result": result}


def load_prompt(url: str) -> Prompt:
    """A prompt's joined embeddings from a .safetensors file."""
    tensors = from_safetensors(storage.read_bytes(url))
    if "text" not in tensors:
        raise ValueError(f"prompt: {url} holds no tensor `text`")
    return Prompt(tensors["text"], tensors.get("pooled"))


def restore_file(
    restorer: Restorer, sandbox: Sandbox, config: RestoreConfig, row: dict[str, Any], folder: str
) -> dict[str, Any]:
    """Restore one file, with `folder` for what is temporary; returns its facts for the manifest."""
    before = dict(restorer.seconds)
    with storage.local_copy(row["input"], folder) as source:
        about = sandbox.call(media.probe, source)
        size = config.output_size(about.height, about.width)
        facts: dict[str, Any] = {
            "media": about.media,
            "input_size": [about.height, about.width],
            "output_size": list(size),
            "fps": float(about.fps),
        }
        if about.media == "image":
            (restored,) = restorer.restore([sandbox.call(media.load_image, source)], size)
            url = storage.join(config.output, f"{row['name']}.png")
            storage.write_bytes(url, _png(restored[0]))
            facts |= {"output": url, "frames": 1}
        else:
            ending = "mkv" if config.lossless else config.container
            pictures = os.path.join(folder, f"pictures.{ending}")
            facts["frames"] = restore_pictures(restorer, sandbox, config, source, about, size, pictures)
            # mp4 cannot hold every codec, Matroska nearly all.
            path, facts["streams_copied"], facts["streams_left"] = sandbox.call(
                container.copy_sound, source, pictures, os.path.join(folder, "joined"), [ending, "mkv"]
            )
            facts["output"] = storage.join(config.output, row["name"] + os.path.splitext(path)[1])
            publish(path, facts["output"])
    parts = {part: round(restorer.seconds[part] - before[part], 3) for part in before}
    return {**facts, "seconds_in": parts}


def restore_pictures(
    restorer: Restorer,
    sandbox: Sandbox,
    config: RestoreConfig,
    source: str,
    about: media.Probe,
    size: tuple[int, int],
    target: str,
) -> int:
    """Write the restored pictures of a video, each at its source's time stamp; returns how many."""
    stamps: deque[int] = deque()  # of frames that are read but not yet written

    def frames() -> Iterator[np.ndarray]:
        for stamp, frame in sandbox.stream(container.stamped_frames, source):
            stamps.append(stamp)
            yield frame

    count = 0
    with encoding.VideoWriter(
        target,
        about.fps,
        size[1],
        size[0],
        lossless=config.lossless,
        crf=config.crf,
        time_base=about.time_base,
    ) as writer:
        for restored in restorer.restore(frames(), size):
            for frame in restored:
                writer.write(frame, stamps.popleft() - about.start_pts)
            count += len(restored)
    return count


def publish(path: str, url: str) -> None:
    """Move a local file to its URL: readers see all of it or none."""
    if url.startswith("s3://"):
        storage.filesystem(url).put_file(path, storage.path_of(url))
        return
    target = storage.path_of(url)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex}.partial"
    shutil.move(path, partial)
    os.replace(partial, target)


def _png(frame: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(frame).save(sink, format="PNG")
    return sink.getvalue()


def run(config: RestoreConfig) -> stage.Summary:
    """Restore every file that is not done yet; write `manifest.json` and the summary."""
    inputs = list_inputs(config)
    for row in inputs:
        row["fingerprint"] = fingerprint(config, row)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.output, config.shared_filesystem, "output")
        done = [found for row in inputs if (found := finished(config, row)) is not None]
        known = {found["input"] for found in done}
        pending = [row for row in inputs if row["input"] not in known]
        made = restore_all(config, pending)
        rows = sorted([*done, *made], key=lambda found: found["name"])
        storage.write_json(storage.join(config.output, MANIFEST), rows)
        fill_summary(summary, rows, made)

    return stage.run_stage("restore", config.output, work)


def restore_all(config: RestoreConfig, pending: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest rows of all pending files, made by the actors."""
    if not pending:
        return []
    dataset = ray.data.from_items(pending, override_num_blocks=len(pending)).map(
        cast(Any, RestoreActor),  # Ray's types leave out callable classes
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(config.actors, len(pending))),
        num_cpus=config.cpus,
        num_gpus=config.gpus,
    )
    dataset.set_name("restore")
    return [row["result"] for row in dataset.take_all()]


def fill_summary(summary: stage.Summary, rows: list[dict[str, Any]], made: list[dict[str, Any]]) -> None:
    """Counts and speed: `rows` of all files, `made` in this run."""
    good = [row for row in made if not row["error"]]
    summary.rows_in = len(rows)
    summary.rows_kept = sum(1 for row in rows if not row["error"])
    summary.errors = len(rows) - summary.rows_kept
    summary.already_done = len(rows) - len(made)
    for row in rows:
        if row["error"]:
            print(f"not restored: {row['error']}", flush=True)
    frames, seconds = sum(row["frames"] for row in good), sum(row["seconds"] for row in good)
    parts = {part: sum(row["seconds_in"][part] for row in good) for part in STEPS_OF_WORK}
    networks = parts["encode"] + parts["transformer"] + parts["decode"]
    summary.details = {
        "frames": frames,
        "frames/s of one actor": round(frames / seconds, 2) if seconds else 0.0,
        "seconds in": {part: round(spent, 1) for part, spent in parts.items()},
        "share outside the networks": round(1 - networks / seconds, 3) if seconds else 0.0,
    }
