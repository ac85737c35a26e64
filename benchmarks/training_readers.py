"""Reading precomputed samples (part of training.py): ours, torch's DataLoader on .pt files, WebDataset.

The same samples (5x256x256 latents of 0.26 MB and text of SD3's widths, 0.8 MB, all random) in each way, in
an order that is a full shuffle for all three: ours has them within one window, the DataLoader draws them one
by one, WebDataset has a buffer as large as the data. Each has one background worker (ours is a thread) and
hands over fp32 latents and the joined text. Seconds from the first sample to the last; several passes, their
median.

cold: the files' pages are dropped from the cache before; warm: read just before; s3: from moto's server, a
process of its own. WebDataset is no dependency of ours: `pip install webdataset` before this benchmark, or
its numbers are null and a line says so.
"""

import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from model import text_encoders
from model.dit.swin_mmdit import TINY
from pipeline.data import text_embeddings
from pipeline.data.cropping import Bucket
from pipeline.runtime import work_plan
from pipeline.store import bf16_columns, delta_tables, parquet, schema, storage
from pipeline.training.runs import trainer
from pipeline.training.samples import latent_reader, sample_order

Sample = dict[str, Any]
BUCKET = "samples"
_PER_FILE = 64
_TEXT = {"clip_l": (40, 768), "clip_g": (40, 1280), "t5": (60, 4096), "pooled_l": (768,), "pooled_g": (1280,)}
_LATENT = (2, 32, 32, 16)


def make_sample(number: int) -> Sample:
    """Random bf16 tensors."""
    draw = torch.Generator().manual_seed(number)
    shapes = {"hq": _LATENT, "lq": _LATENT, **_TEXT}
    return {key: torch.randn(shape, generator=draw).bfloat16() for key, shape in shapes.items()}


def null_text() -> text_encoders.TextEmbedding:
    """Two tokens of each encoder; a pooled vector has no tokens to leave out."""
    return embedding({key: value if value.ndim == 1 else value[:2] for key, value in make_sample(0).items()})


def embedding(sample: Sample) -> text_encoders.TextEmbedding:
    return text_encoders.TextEmbedding(**{key: sample[key].float() for key in _TEXT})


def used(sample: Sample) -> Sample:
    """What training takes of a sample."""
    tokens, pooled = text_encoders.join(embedding(sample), embedding(sample), False, False, False)
    return {"hq": sample["hq"].float(), "lq": sample["lq"].float(), "text": tokens, "pooled": pooled}


def write_all(url: str, count: int) -> None:
    """The samples as our tables, as one .pt file each, and as tars."""
    write_latents(url, count)
    for first in range(0, count, _PER_FILE):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for number in range(first, min(count, first + _PER_FILE)):
                data = io.BytesIO()
                torch.save(make_sample(number), data)
                storage.write_bytes(f"{url}/pt/{number:06d}.pt", data.getvalue())
                info = tarfile.TarInfo(f"{number:06d}.pt")
                info.size = len(data.getvalue())
                tar.addfile(info, io.BytesIO(data.getvalue()))
        storage.write_bytes(f"{url}/tar/{first:06d}.tar", packed.getvalue())


def write_latents(url: str, count: int) -> None:
    """The samples as our tables."""
    for first in range(0, count, _PER_FILE):
        latents, texts = {}, {}
        for number in range(first, min(count, first + _PER_FILE)):
            sample = make_sample(number)
            columns = [bf16_columns.to_columns(f"{which}_latent", sample[which]) for which in ("hq", "lq")]
            latents[f"{number:06d}"] = columns[0] | columns[1]
            texts[f"{number:06d}"] = embedding(sample)
        write_tables(url, first, latents, texts, null_text(), Bucket(5, 256, 256))


def write_tables(
    url: str,
    first: int,
    latents: dict[str, dict[str, Any]],
    texts: dict[str, text_encoders.TextEmbedding],
    null: text_encoders.TextEmbedding,
    bucket: Bucket,
) -> None:
    """latents/, its index and text/ of one shard, as precompute writes them; an eighth is held out."""
    name = f"part-{first:06d}.parquet"
    rows = [schema.empty_row(schema.LATENTS_SCHEMA, sample_id=k, clip_id=k, **v) for k, v in latents.items()]
    text_rows = [
        schema.empty_row(schema.TEXT_SCHEMA, clip_id=key, **text_embeddings.text_columns(value))
        for key, value in texts.items()
    ]
    metadata = {"text": "encoders", "openseedvr.null_text": text_embeddings.null_metadata(null)}
    text_schema = schema.with_fingerprint(schema.TEXT_SCHEMA, "benchmark", **metadata)
    for table, made, kind in (("latents", rows, schema.LATENTS_SCHEMA), ("text", text_rows, text_schema)):
        delta_tables.write(f"{url}/{table}", name, work_plan.row_groups(made, kind), kind)
    size = {"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    shared = {"bucket": bucket.name, "video_tokens": schema.video_tokens(**size), **size, "file": name}
    index = []
    for group in range(parquet.read_metadata(f"{url}/latents/{name}").num_row_groups):
        ids = parquet.read_table(f"{url}/latents/{name}", ["sample_id"], row_group=group)["sample_id"]
        for row, key in enumerate(ids.to_pylist()):
            own = {"sample_id": key, "clip_id": key, "row_group": group, "row": row}
            own |= {"split": "train" if int(key) % 8 else "held_out", "text_tokens": len(texts[key].t5)}
            index.append(schema.empty_row(schema.INDEX_SCHEMA, **shared, **own))
    table = pa.Table.from_pylist(index, schema=schema.INDEX_SCHEMA)
    delta_tables.write(f"{url}/latents/_index", name, [table], schema.INDEX_SCHEMA)


class PtFiles(Dataset):
    """One .pt file a sample."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.count = url, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        return used(torch.load(io.BytesIO(storage.read_bytes(f"{self.url}/pt/{number:06d}.pt"))))


def ours(url: str, count: int, epoch: int) -> Iterator[Sample]:
    reader = latent_reader.LatentReader(url)
    stream = sample_order.SampleStream(latent_reader.read_index(url), 0, TINY)

    def samples() -> Iterator[Sample]:
        for position in range(epoch * count, (epoch + 1) * count):
            row = stream[position].row
            hq, lq = reader.latents(row, epoch)
            tokens, pooled = reader.prompt(row["clip_id"], (False, False, False))
            yield {"hq": hq, "lq": lq, "text": tokens, "pooled": pooled}
        yield {}

    return iter(trainer.prefetched(samples(), ahead=8).__next__, {})


def torch_loader(url: str, count: int, epoch: int) -> Iterator[Sample]:
    torch.manual_seed(epoch)
    loader = DataLoader(
        PtFiles(url, count),
        batch_size=None,
        shuffle=True,
        num_workers=1,
        prefetch_factor=8,
        multiprocessing_context="spawn",
    )
    return iter(loader)


def decode_pt(sample: dict[str, Any]) -> Sample:
    """Turn a member of a tar into a sample.

    It is a function of this module so that a worker that unpickles it can read from S3 too.
    """
    return used(torch.load(io.BytesIO(sample["pt"])))


def open_url(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    return io.BytesIO(storage.read_bytes(url))


def webdataset_loader(url: str, count: int, epoch: int) -> Iterator[Sample]:
    import webdataset

    urls = [f"{url}/tar/{first:06d}.tar" for first in range(0, count, _PER_FILE)]
    if url.startswith("file://"):
        urls = [storage.path_of(one) for one in urls]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=epoch)
        .shuffle(count, initial=count)
        .map(decode_pt)
    )
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, prefetch_factor=8, multiprocessing_context="spawn"
    )
    return iter(loader)


if importlib.util.find_spec("webdataset") is not None:
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = open_url

LOADERS: dict[str, Callable[[str, int, int], Iterator[Sample]]] = {
    "ours": ours, "torch": torch_loader, "webdataset": webdataset_loader
}  # fmt: skip


def drop_cache(url: str) -> None:
    """Drop the pages of a local folder's files from the system's cache."""
    for path in Path(storage.path_of(url)).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def samples_per_second(loader: str, url: str, count: int, epoch: int) -> float:
    """Of one pass, from its first sample to its last."""
    iterator = LOADERS[loader](url, count, epoch)
    checked = next(iterator)
    assert checked["hq"].dtype == torch.float32 and checked["text"].shape[1] == 4096
    begin, seen = time.perf_counter(), 1
    for _ in iterator:
        seen += 1
    seconds = time.perf_counter() - begin
    assert seen == count, f"{loader}: {seen} of {count} samples"
    return (count - 1) / seconds


def measure(url: str, count: int, rounds: int, cold: bool) -> dict[str, float | None]:
    """Median samples/s of each loader, taking turns."""
    present = [name for name in LOADERS if name != "webdataset" or importlib.util.find_spec(name)]
    rates: dict[str, list[float]] = {name: [] for name in present}
    for turn in range(rounds):
        for name in present:
            if cold:
                drop_cache(url)
            rates[name].append(samples_per_second(name, url, count, turn))
    return {name: statistics.median(rates[name]) if name in rates else None for name in LOADERS}


class Server:
    """moto's S3 in a process of its own."""

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", "5997"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        endpoint = "http://127.0.0.1:5997"
        settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        self._environment = mock.patch.dict(os.environ, {**settings, "AWS_DEFAULT_REGION": "us-east-1"})
        self._environment.start()
        for _ in range(60):
            try:
                boto3.client("s3").create_bucket(Bucket=BUCKET)
                break
            except Exception:  # it needs some seconds
                time.sleep(1)
        return f"s3://{BUCKET}/data"

    def __exit__(self, *_: object) -> None:
        self._environment.stop()
        self._process.terminate()
        self._process.wait()


def run(folder: str, short: bool) -> dict[str, Any]:
    count, rounds = (128, 1) if short else (512, 3)
    if importlib.util.find_spec("webdataset") is None:
        print("webdataset is not installed (pip install webdataset): its numbers are missing", flush=True)
    found: dict[str, Any] = {"samples": count}
    write_all(f"file://{folder}", count)
    found["cold"] = measure(f"file://{folder}", count, rounds, cold=True)
    found["warm"] = measure(f"file://{folder}", count, rounds, cold=False)
    with Server() as url:
        write_all(url, count // 4)
        found["s3"] = measure(url, count // 4, rounds, cold=False)
    for rival in ("torch", "webdataset"):
        ratios = {
            kind: found[kind]["ours"] / found[kind][rival]
            for kind in ("cold", "warm", "s3")
            if found[kind][rival]
        }
        found[f"ratio_{rival}"] = ratios or None
    found["ratio_least"] = {
        rival: float(np.min(list(found[f"ratio_{rival}"].values()))) if found[f"ratio_{rival}"] else None
        for rival in ("torch", "webdataset")
    }
    return found
