"""Restores any video or image: same frames, time stamps and sound, with a `manifest.json` of the results.

One file is one task of an actor that holds the models. A finished file leaves a row in `_manifest/`, so that
a killed run resumes with the files that are missing; a file that cannot be read becomes a row with `error`
and never ends the job. From Python: `from pipeline.restoration.restore import Restorer`.
"""

import contextlib
import dataclasses
import tempfile
import time
from typing import Any, cast

import ray
import torch

from model import preprocess
from pipeline.restoration import inputs, preview_page
from pipeline.restoration.memory_plan import free_gib, is_out_of_memory, plan_memory, step_down
from pipeline.restoration.restore_file import (
    Encoding,
    SourceVideo,
    Target,
    VideoJob,
    open_sequence,
    open_video,
    restore_image,
    restore_video,
)
from pipeline.restoration.restorer import STEPS_OF_WORK, Restorer
from pipeline.restoration.resume import RestoredParts
from pipeline.restoration.sampling_config import Sampling
from pipeline.runtime import stage
from pipeline.store import hashing, storage
from pipeline.store.urls import Url, check_urls
from pipeline.video import decoding
from pipeline.video.sandbox import Sandbox
from pipeline.weights import backbones

__all__ = ["Encoding", "RestoreConfig", "Restorer", "Sampling", "run"]

MANIFEST = "manifest.json"
_ROWS, _PARTS = "_manifest", "_parts"
PLAN = "plan.json"
_MAX_SIDE_PX = 16384


@dataclasses.dataclass(frozen=True)
class RestoreConfig:
    """What `jobs.restore` reads."""

    input: Url | list[Url]
    """Absolute URL of a file or of a folder, whose videos and images are all restored with those of its
    subfolders; or a list of such URLs."""
    output: Url
    """Absolute URL of the folder for the results, which keep their path relative to their input folder."""
    model: backbones.ModelConfig
    """The transformer, ours or a released one, and the autoencoder."""
    scale: float | None = None
    """Factor by which the input is enlarged. Give at most one of `scale`, `short_side`, `area` and `size`;
    with none, our models keep the input's size and released ones restore to the area of 720x1280, as their
    scripts do."""
    short_side: int | None = None
    """Length in pixels to which the shorter side is resized; null leaves the size to `scale`, `area` or
    `size`."""
    area: tuple[int, int] | None = None
    """Height and width whose area the result has, while it keeps the input's aspect ratio; null leaves the
    size to `scale`, `short_side` or `size`."""
    size: tuple[int, int] | None = None
    """Height and width of the result in pixels, whatever the input's aspect ratio; null leaves the size to
    `scale`, `short_side` or `area`."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """Steps, guidance, noise, colour correction and chunk lengths of the restoration."""
    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    """Codec, bit depth and container of restored videos."""
    sequence_fps: float | None = None
    """Frames per second with which the images of each folder, in the order of their names, are restored as
    one video; null restores every image by itself."""
    previews: int = 24
    """Number of files of which preview.html shows a frame before and after."""
    memory_gib: float | None = None
    """Memory in GiB that the networks and their work may use in each process, on its GPU if it has one; null
    uses what is free when the process starts."""
    actors: int = 1
    """Number of processes that restore, each with its own copy of the models."""
    cpus: float = 1.0
    """CPU cores reserved for each restoring process."""
    gpus: float = 0.0
    """GPUs reserved for each restoring process; 0 works on the CPU."""
    decode_seconds: float = 60.0
    """Time limit in seconds for decoding one frame; a file that exceeds it becomes an error row."""
    shared_filesystem: bool = False
    """Set this to true if file:// URLs in this config name folders that every node mounts."""

    def __post_init__(self) -> None:
        check_urls(self)
        if not self.inputs:
            raise ValueError("input: empty; give at least one file or folder")
        if self.sampling.schedule(self.model.schedule).guidance_scale != 1 and not self.model.can_guide:
            needed = "model.positive" if self.model.positive is None else "model.negative"
            raise ValueError(f"sampling.guidance_scale: guidance needs {needed}, a file of text embeddings")
        if sum(target is not None for target in self.targets) > 1:
            raise ValueError("scale, short_side, area, size: give at most one of them")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"memory_gib: {self.memory_gib}; it must be above 0")
        if self.sequence_fps is not None and not 0 < self.sequence_fps <= 1000:
            raise ValueError(f"sequence_fps: {self.sequence_fps} is not within 0 to 1000")
        if self.actors < 1:
            raise ValueError(f"actors: {self.actors}; it must be at least 1")

    @property
    def inputs(self) -> list[str]:
        """The input URLs."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def targets(self) -> tuple[object, ...]:
        """The options for the result's size, of which at most one is given."""
        return (self.scale, self.short_side, self.area, self.size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result for an input of this size. ValueError if it makes no sense."""
        area = self.area
        if self.model.kind != "own" and self.targets == (None,) * 4:
            area = backbones.RELEASED_AREA
        if self.size is not None:
            result = self.size
        elif area is not None:
            result = preprocess.resized_size(height, width, *area)
        else:
            factor = self.scale or 1.0
            if self.short_side is not None:
                factor = self.short_side / min(height, width)
            result = round(height * factor), round(width * factor)
        if min(result) < 1 or max(result) > _MAX_SIDE_PX:
            raise ValueError(f"{width}x{height} would become {result[1]}x{result[0]} pixels")
        return result


def list_inputs(config: RestoreConfig) -> list[dict[str, Any]]:
    """One row per result, from `inputs.find_inputs`; prints which files are left out."""
    rows, left_out = inputs.find_inputs(config.inputs, as_sequences=config.sequence_fps is not None)
    if left_out:
        print(inputs.describe_left_out(left_out), flush=True)
    return rows


def target_of(config: RestoreConfig, row: dict[str, Any]) -> Target:
    """Where a row's result goes, and its parts and preview meanwhile."""
    number = hashing.stable_id(row["name"])
    preview = storage.join(config.output, preview_page.FOLDER, number) if row["preview"] else None
    return Target(
        result=storage.join(config.output, row["name"]),
        parts=storage.join(config.output, _PARTS, number),
        preview=preview,
        name=row["name"],
    )


def row_url(config: RestoreConfig, row: dict[str, Any]) -> str:
    """Where the manifest row of a finished file is kept."""
    return storage.join(config.output, _ROWS, f"{hashing.stable_id(row['name'])}.json")


def fingerprint(config: RestoreConfig, row: dict[str, Any]) -> str:
    """Hash of everything that determines a result: a file is done only if its result has the same one."""
    return hashing.fingerprint(
        source=(row["input"], row["bytes"], row["etag"]),
        models=config.model.hashes(),
        kind=(config.model.kind, config.model.shape_quirk),
        sampling=dataclasses.asdict(config.sampling),
        size=config.targets,
        encoding=dataclasses.asdict(config.encoding),
    )


def finished(config: RestoreConfig, row: dict[str, Any]) -> dict[str, Any] | None:
    """Manifest row of a file that an earlier run restored with the same settings, if the result exists."""
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
        self.budget_gib = config.memory_gib or free_gib(device, config.actors)
        self.restorer = Restorer.from_weights(config.model, config.sampling, device)
        self.sandbox = Sandbox(config.decode_seconds)
        networks = (self.restorer.vae, self.restorer.dit)
        millions = sum(tensor.numel() for network in networks for tensor in network.parameters()) / 1e6
        self.models = {
            "model": config.model.kind,
            "parameters_m": round(millions, 3),
            **config.model.hashes(),
        }

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The file's manifest row, which is also written, whatever happens to the file."""
        start = time.monotonic()
        result = {**row, **self.models, "seed": self.config.sampling.seed, "error": None}
        result.pop("files")
        try:
            with tempfile.TemporaryDirectory() as folder:
                result |= self.restore_file(row, folder)
        except (ValueError, OSError) as error:
            result |= {"error": f"{row['input']}: {error}"}
        result["seconds"] = round(time.monotonic() - start, 3)
        storage.write_json(row_url(self.config, row), result)
        return {"result": result}

    def restore_file(self, row: dict[str, Any], folder: str) -> dict[str, Any]:
        """Restore one file, with `folder` for what is temporary; returns its facts for the manifest."""
        config, restorer, sandbox = self.config, self.restorer, self.sandbox
        before = dict(restorer.seconds)
        with contextlib.ExitStack() as stack:
            if row["files"]:
                assert config.sequence_fps is not None
                source = open_sequence(row["files"], config.sequence_fps, sandbox, folder)
            else:
                path = stack.enter_context(storage.local_copy(row["input"], folder))
                source = open_video(path, sandbox.call(decoding.probe, path), sandbox, config.encoding.deep)
            about = source.about
            size = config.output_size(about.height, about.width)
            facts: dict[str, Any] = {
                "media": about.media,
                "input_size": [about.height, about.width],
                "output_size": list(size),
                "fps": float(about.fps),
            }
            facts |= self.within_memory(row, source, size, folder)
        parts = {part: round(restorer.seconds[part] - before[part], 3) for part in before}
        return {**facts, "seconds_in": parts}

    def within_memory(
        self, row: dict[str, Any], source: SourceVideo, size: tuple[int, int], folder: str
    ) -> dict[str, Any]:
        """Restore with the plan for this size; if memory runs out anyway, with the next smaller one.

        The plan is stored with the parts, and a job that resumes the file follows it whatever memory is free
        by then, since the length of the chunks shows in the result.
        """
        target = target_of(self.config, row)
        candidates = self.restorer.plans(size)
        plan_url = storage.join(target.parts, PLAN)
        kept = storage.read_json(plan_url) if storage.exists(plan_url) else {}
        plan = plan_memory(candidates, self.budget_gib)
        if kept.pop("fingerprint", None) == row["fingerprint"]:
            plan = next((one for one in candidates if dataclasses.asdict(one) == kept), plan)
        while True:
            print(f"{row['name']}: {plan.describe()}; budget {self.budget_gib:.2f} GiB", flush=True)
            self.restorer.plan = plan
            try:
                facts = self.by_plan(row, source, size, target, folder)
                return {**facts, "plan": dataclasses.asdict(plan)}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = step_down(candidates, plan, self.restorer.part)
                if smaller is None:
                    raise ValueError("out of memory with the smallest plan; give it more") from None
                print(f"{row['name']}: out of memory; trying again with less", flush=True)
                plan = smaller
            torch.cuda.empty_cache()  # outside of `except`, since the error keeps the allocated memory alive

    def by_plan(
        self, row: dict[str, Any], source: SourceVideo, size: tuple[int, int], target: Target, folder: str
    ) -> dict[str, Any]:
        """Restore by the restorer's plan."""
        if source.about.media == "image":
            assert source.path is not None
            return restore_image(self.restorer, source.path, size, target, self.sandbox)
        plan = dataclasses.asdict(self.restorer.plan) if self.restorer.plan else {}
        parts = RestoredParts(target.parts, hashing.fingerprint(row=row["fingerprint"], plan=plan), folder)
        state = parts.load()
        storage.write_json(storage.join(target.parts, PLAN), {**plan, "fingerprint": row["fingerprint"]})
        encoding = self.config.encoding
        job = VideoJob(self.restorer, source, size, encoding, target, parts, self.sandbox, folder)
        return restore_video(job, state)


def run(config: RestoreConfig) -> stage.Summary:
    """Restore every file that is not done yet; write `manifest.json` and the summary."""
    listed = list_inputs(config)
    for index, row in enumerate(listed):
        row["preview"] = index < config.previews
        row["fingerprint"] = fingerprint(config, row)

    def work(summary: stage.Summary) -> None:
        stage.check_shared(config.output, config.shared_filesystem, "output")
        done = [found for row in listed if (found := finished(config, row)) is not None]
        known = {found["input"] for found in done}
        pending = [row for row in listed if row["input"] not in known]
        made = restore_all(config, pending)
        rows = sorted([*done, *made], key=lambda found: found["name"])
        storage.write_json(storage.join(config.output, MANIFEST), rows)
        preview_page.write(config.output, rows)
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
