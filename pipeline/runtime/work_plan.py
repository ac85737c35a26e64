"""Plans and shards: how a stage divides its rows, skips finished ones and survives a kill.

A plan assigns input rows to shards. One task makes one shard and writes it as `part-<plan>-<shard>.parquet`,
either whole or not at all; the driver commits the files to the stage's table, whose log alone says which
shards are done. A stage that is run again makes only what is missing, and commits what a killed run had
written and not committed, so rows are neither lost nor written twice. Rows of a later plan (new clips, a
looser threshold) go to new files beside the old ones.

Plans are a table of their own below `_plan/`: a plan is a Parquet file `<plan>-<shards>.parquet` whose row
groups are its shards, of equal size; a task reads its own row group. Many rows make several plans of at most
`ROWS_PER_PLAN`, so that the driver holds only one of them at a time and 8 bytes for each row of the others.
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
from pipeline.store import delta_tables, hashing, parquet, schema, storage

PLANS = "_plan"
PLAN_SCHEMA = pa.schema([("id", pa.string()), ("row", pa.string())])
ROWS_PER_PLAN = 8192


@dataclasses.dataclass(frozen=True)
class Shard:
    """One unit of work: a few planned rows (a row group of a plan) and the file that they become."""

    plan: str
    number: int
    size: int  # rows
    of: int  # shards of the plan

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
    for table in (delta_tables.open_table(folder_url), _plans(folder_url)):
        if table is not None and table.fingerprint != fingerprint:
            raise ValueError(
                f"{folder_url}: holds rows made with other settings or models (fingerprint "
                f"{table.fingerprint}, now {fingerprint}); write to another folder or remove this one"
            )


def _plans(folder_url: str) -> delta_tables.Table | None:
    return delta_tables.open_table(storage.join(folder_url, PLANS))


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
    ids = delta_tables.iterate(storage.join(folder_url, PLANS), ["id"])
    parts = [_hashes(table["id"].to_pylist()) for table in ids]
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
    shards = -(-len(rows) // rows_per_shard)
    edges = _edges(len(rows), shards)
    groups = [table.slice(first, last - first) for first, last in itertools.pairwise(edges)]
    plan_schema = schema.with_fingerprint(PLAN_SCHEMA, fingerprint)
    delta_tables.write(storage.join(folder_url, PLANS), plan_file(name, shards), groups, plan_schema)


def _edges(rows: int, shards: int) -> list[int]:
    """Where the shards of a plan begin and end: equal parts, none larger than was asked for."""
    return [rows * number // shards for number in range(shards + 1)]


def plan_file(plan_name: str, shards: int) -> str:
    """The file of a plan in the table of plans; its name says how many shards it has."""
    return f"{plan_name}-{shards}.parquet"


def planned_shards(folder_url: str) -> Iterator[Shard]:
    """Every shard of every plan, whether it has been made or not."""
    plans = _plans(folder_url)
    for file in () if plans is None else plans.files:
        name, shards = file.name.removesuffix(".parquet").rsplit("-", 1)
        edges = _edges(file.rows, int(shards))
        for number, (first, last) in enumerate(itertools.pairwise(edges)):
            yield Shard(name, number, last - first, int(shards))


def pending_shards(folder_url: str) -> list[Shard]:
    """The planned shards that are not made yet. What a killed run left uncommitted is committed first."""
    made = delta_tables.open_table(folder_url)
    names = set() if made is None else made.names
    pending = [shard for shard in planned_shards(folder_url) if shard.name not in names]
    found = _commit_leftover(folder_url, {shard.name for shard in pending}) if pending else set()
    return [shard for shard in pending if shard.name not in found]


def _commit_leftover(folder_url: str, names: set[str]) -> set[str]:
    """Commit the whole files of these names that lie in the folder; returns the names of those."""
    there = {url.rsplit("/", 1)[1] for url, _, _ in storage.files_in(folder_url)}
    leftover = sorted(names & there)
    if leftover:
        table_schema = parquet.read_schema(storage.join(folder_url, leftover[0]))
        delta_tables.append(folder_url, table_schema, delta_tables.whole_files(folder_url, leftover))
    return set(leftover)


def read_shard(folder_url: str, shard: Shard) -> list[dict[str, Any]]:
    """The planned rows of a shard."""
    url = storage.join(folder_url, PLANS, plan_file(shard.plan, shard.of))
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


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """A task's report on its shard."""

    name: str
    rows: int
    errors: int
    seconds: float
    bytes: int
    """of the file"""

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
    groups = row_groups(rows, table_schema)
    size, _ = parquet.write_table(storage.join(folder_url, shard.name), groups, table_schema)
    errors = sum(1 for row in rows if row.get("error"))
    prometheus.count_shard(folder_url.rsplit("/", 1)[1], len(rows), errors, size)
    return ShardReport(shard.name, len(rows), errors, time.monotonic() - start, size).as_row()


def commit(folder_url: str, table_schema: pa.Schema, reports: list[dict[str, Any]]) -> None:
    """Let the files of these reports belong to the stage's table. By the driver alone."""
    files = [delta_tables.DataFile(report["name"], report["rows"], report["bytes"]) for report in reports]
    delta_tables.append(folder_url, table_schema, files)


def count_reasons(reasons: list[str | None]) -> dict[str, int]:
    """Count the reasons by the part before ':', most frequent first."""
    counted = Counter(reason.split(":")[0] for reason in reasons if reason)
    return dict(counted.most_common())
