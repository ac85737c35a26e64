"""Plans and shards: how a stage divides its rows, skips finished ones and survives a kill.

A plan assigns input rows to shards. One task makes one shard and writes it as `part-<plan>-<shard>.parquet`,
either whole or not at all; an existing file means that the shard is done. A stage that is run again therefore
makes only what is missing, and rows are neither lost nor written twice. Rows of a later plan (new clips, a
looser threshold) go to new files beside the old ones.

A plan is a Parquet file below `_plan/` whose row groups are the shards; a task reads its own row group. Many
rows make several plans of at most `ROWS_PER_PLAN`, so that the driver holds only one of them at a time and 8
bytes for each row of the others.
"""

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.runtime import prometheus
from pipeline.store import hashing, parquet, schema, storage

PLANS = "_plan"
PLAN_SCHEMA = pa.schema([("id", pa.string()), ("row", pa.string())])
ROWS_PER_PLAN = 8192


@dataclasses.dataclass(frozen=True)
class Shard:
    """One unit of work: a few planned rows (a row group of a plan) and the file that they become."""

    plan: str
    number: int
    size: int  # rows

    @property
    def name(self) -> str:
        return f"part-{self.plan}-{self.number:05d}.parquet"

    def to_json(self) -> str:
        """The form in which a shard is sent to its task."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Planned:
    """The work left for a stage: the shards without a file."""

    rows: int  # that were given, each once
    pending: list[Shard]

    @property
    def already_done(self) -> int:
        """Rows whose shard was made before; may exceed `rows` if an earlier run had others."""
        return max(0, self.rows - sum(shard.size for shard in self.pending))


def check_fingerprint(folder_url: str, fingerprint: str) -> None:
    """Raise ValueError if the folder holds rows, or plans of rows, made with other settings."""
    files = [*parquet.parquet_files(folder_url)[:1], *_plan_files(folder_url)[:1]]
    for file in files:
        found = (parquet.read_schema(file).metadata or {}).get(schema.FINGERPRINT_KEY, b"").decode()
        if found != fingerprint:
            raise ValueError(
                f"{folder_url}: holds rows made with other settings or models (fingerprint "
                f"{found or 'none'}, now {fingerprint}); write to another folder or remove this one"
            )


def _plan_files(folder_url: str) -> list[str]:
    return parquet.parquet_files(storage.join(folder_url, PLANS))


def _hashes(ids: Iterable[str]) -> np.ndarray:
    """A 63-bit number per id; the chance that any two collide is 5% for a billion ids, 5e-8 for a million."""
    return np.fromiter((hashing.stable_hash(row_id) for row_id in ids), np.int64)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each value is in the sorted array."""
    places = np.searchsorted(known, values)
    return np.append(known, -1)[places] == values


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, ROWS_PER_PLAN)):
        yield chunk


def plan(
    folder_url: str,
    rows: Iterable[dict[str, Any]],
    id_column: str,
    fingerprint: str,
    rows_per_shard: int,
    near: Callable[[dict[str, Any]], str] | None = None,
) -> Planned:
    """Plan the rows that no earlier plan holds, then list every planned shard that is not made yet.

    A row holds what its task needs to begin with; its `id_column` identifies it, and rows with the same id
    count once. near: rows for which it returns the same value (a source's clips) go to the same shard if
    possible. Plans are written before any work starts, so a stage that was killed finds the same shards
    again, and a late writer of the killed run can only write the same bytes to the same name.
    """
    check_fingerprint(folder_url, fingerprint)
    parts = [_hashes(parquet.read_table(file, ["id"])["id"].to_pylist()) for file in _plan_files(folder_url)]
    known = np.sort(np.concatenate([np.zeros(0, np.int64), *parts]))
    del parts
    seen = np.zeros(0, np.int64)
    for chunk in _chunks(rows):
        by_hash = dict(zip(_hashes(row[id_column] for row in chunk).tolist(), chunk, strict=True))
        hashes = np.fromiter(by_hash, np.int64)
        seen = _merge(seen, hashes[~_among(hashes, seen)])
        fresh = hashes[~_among(hashes, known)]
        if len(fresh):
            _write_plan(
                folder_url, [by_hash[int(key)] for key in fresh], id_column, fingerprint, rows_per_shard, near
            )
            known = _merge(known, fresh)
    return Planned(len(seen), pending_shards(folder_url))


def _merge(known: np.ndarray, more: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([known, more]), kind="stable")  # two sorted runs: linear


def _write_plan(
    folder_url: str,
    rows: list[dict[str, Any]],
    id_column: str,
    fingerprint: str,
    rows_per_shard: int,
    near: Callable[[dict[str, Any]], str] | None,
) -> None:
    """One plan file; its rows in the order of hashes, so that a shard is a fair mixture."""

    def order(row: dict[str, Any]) -> tuple[int, str]:
        return hashing.stable_hash(near(row) if near else row[id_column]), row[id_column]

    rows = sorted(rows, key=order)
    name = hashing.stable_id(fingerprint, *[row[id_column] for row in rows])[:12]
    table = pa.Table.from_pylist(
        [{"id": row[id_column], "row": json.dumps(row)} for row in rows], schema=PLAN_SCHEMA
    )
    # Equal parts, none of them larger than requested.
    number = -(-len(rows) // rows_per_shard)
    edges = [len(rows) * i // number for i in range(number + 1)]
    groups = [table.slice(first, last - first) for first, last in itertools.pairwise(edges)]
    url = storage.join(folder_url, PLANS, f"{name}.parquet")
    parquet.write_table(url, groups, schema.with_fingerprint(PLAN_SCHEMA, fingerprint))


def planned_shards(folder_url: str) -> Iterator[Shard]:
    """Every shard of every plan, whether it has been made or not."""
    for file in _plan_files(folder_url):
        name = file.rsplit("/", 1)[1].removesuffix(".parquet")
        footer = parquet.read_metadata(file)
        for number in range(footer.num_row_groups):
            yield Shard(name, number, footer.row_group(number).num_rows)


def pending_shards(folder_url: str) -> list[Shard]:
    """The planned shards that have no file yet."""
    made = {url.rsplit("/", 1)[1] for url in parquet.parquet_files(folder_url)}
    return [shard for shard in planned_shards(folder_url) if shard.name not in made]


def read_shard(folder_url: str, shard: Shard) -> list[dict[str, Any]]:
    """The planned rows of a shard."""
    url = storage.join(folder_url, PLANS, f"{shard.plan}.parquet")
    table = parquet.read_table(url, ["row"], row_group=shard.number)
    return [json.loads(row) for row in table["row"].to_pylist()]


def joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows as tables of at least ROWS_PER_PLAN rows, but for the last: fewer, larger row groups."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= ROWS_PER_PLAN:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def row_groups(rows: list[dict[str, Any]], table_schema: pa.Schema) -> list[pa.Table]:
    """The rows as tables of at most 64 rows and about 4 MB each (or one larger row)."""
    groups: list[list[dict[str, Any]]] = [[]]
    size = 0
    for row in rows:
        weight = sum(len(value) for value in row.values() if isinstance(value, bytes))
        full = len(groups[-1]) >= schema.MAX_ROW_GROUP_SAMPLES or size + weight > schema.MAX_ROW_GROUP_BYTES
        if groups[-1] and full:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += weight
    return [pa.Table.from_pylist(group, schema=table_schema) for group in groups if group]


def write_shard(folder_url: str, shard: Shard, rows: list[dict[str, Any]], table_schema: pa.Schema) -> int:
    """Write one shard's rows; returns the file's bytes."""
    url = storage.join(folder_url, shard.name)
    tables = row_groups(rows, table_schema)
    parquet.write_table(url, tables, table_schema)
    return sum(table.nbytes for table in tables)


@dataclasses.dataclass
class ShardReport:
    """A task's report on its shard."""

    rows: int
    errors: int
    seconds: float
    bytes: int

    def as_row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_shard(
    folder_url: str,
    shard_json: str,
    table_schema: pa.Schema,
    make_rows: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Turn a shard's planned rows into output rows, write them, report. Runs in one task or actor."""
    start = time.monotonic()
    shard = Shard(**json.loads(shard_json))
    rows = make_rows(read_shard(folder_url, shard))
    size = write_shard(folder_url, shard, rows, table_schema)
    errors = sum(1 for row in rows if row.get("error"))
    prometheus.count_shard(folder_url.rsplit("/", 1)[1], len(rows), errors, size)
    return ShardReport(len(rows), errors, time.monotonic() - start, size).as_row()


def count_reasons(reasons: list[str | None]) -> dict[str, int]:
    """Count the reasons by the part before ':', most frequent first."""
    counted = Counter(reason.split(":")[0] for reason in reasons if reason)
    return dict(counted.most_common())
