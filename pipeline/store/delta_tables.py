"""Tables as Delta Lake keeps them: plain Parquet files, and a log that says which of them belong to a table.

Workers write whole files into a table's folder; the driver commits them in batches. Versions, atomic commits
and the refusal of a commit that another has overtaken are Delta Lake's.
"""

import dataclasses
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from pipeline.store import parquet, schema, storage

LOG = "_delta_log"
_WRITER = "openseedvr"
"""Every commit of files has this application id and a number of its own, so of two drivers that start from
the same version one is refused, looks again, and finds what the other has committed."""
_ATTEMPTS = 20
_PAUSE_S = 0.2


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A whole Parquet file in a table's folder."""

    name: str
    rows: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Table:
    """One version of a table, as its log tells it."""

    url: str
    version: int
    files: tuple[DataFile, ...]
    """sorted by name"""
    properties: Mapping[str, str]
    """of the whole table: the fingerprint of its rows"""

    @property
    def names(self) -> set[str]:
        return {file.name for file in self.files}

    @property
    def urls(self) -> list[str]:
        return [storage.join(self.url, file.name) for file in self.files]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def fingerprint(self) -> str | None:
        return self.properties.get(schema.FINGERPRINT_KEY.decode())

    def iterate(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows, file by file, so that memory does not grow with the table."""
        files = ((storage.join(self.url, file.name), file.bytes) for file in self.files)
        return parquet.read_tables(files, columns)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows; the table must not be empty."""
        return pa.concat_tables(self.iterate(columns))


def open_table(url: str, version: int | None = None) -> Table | None:
    """A table as it is now, or was in a version; None if there is none."""
    log = _open_log(url, version)
    if log is None:
        return None
    actions = pa.table(log.get_add_actions(flatten=True)).sort_by("path")
    columns = [actions[name].to_pylist() for name in ("path", "num_records", "size_bytes")]
    files = tuple(DataFile(*values) for values in zip(*columns, strict=True))
    return Table(url, log.version(), files, log.metadata().configuration)


def read(url: str, columns: list[str] | None = None) -> pa.Table | None:
    """All rows of a table as it is now; None if there is none or it is empty."""
    table = open_table(url)
    return None if table is None or not table.files else table.read(columns)


def iterate(url: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a table as it is now, file by file; none if there is no table."""
    table = open_table(url)
    return iter(()) if table is None else table.iterate(columns)


def _open_log(url: str, version: int | None = None) -> DeltaTable | None:
    def read() -> DeltaTable | None:
        try:
            return DeltaTable(_place(url), version=version, storage_options=storage.delta_options(url))
        except TableNotFoundError:
            return None
        except DeltaError as error:  # what a store that fails looks like
            raise OSError(str(error)) from error

    return storage.reading(url, read)


def _place(url: str) -> str:
    return url if url.startswith("s3://") else storage.path_of(url)


def append(url: str, table_schema: pa.Schema, files: Iterable[DataFile]) -> None:
    """Add whole files to a table, which is made if there is none; those that it has already stay as they are.

    table_schema: of all files; its fingerprint becomes the table's.
    """
    _commit(url, table_schema, list(files), "append", {})


def replace(url: str, table_schema: pa.Schema, files: Iterable[DataFile], note: Mapping[str, str]) -> None:
    """Let a table consist of these files from now on; its former versions can still be read.

    note: kept in the table's history.
    """
    _commit(url, table_schema, list(files), "overwrite", note)


def whole_files(url: str, names: Iterable[str]) -> list[DataFile]:
    """Files that lie in a table's folder, from their footers."""

    def describe(name: str) -> DataFile:
        file = storage.join(url, name)
        return DataFile(name, parquet.read_metadata(file).num_rows, storage.size_of(file) or 0)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(describe, names))


def write_file(url: str, name: str, tables: Iterable[pa.Table], table_schema: pa.Schema) -> DataFile:
    """Write one file into a table's folder, its row groups the given tables; it is not committed yet."""
    size, rows = parquet.write_table(storage.join(url, name), tables, table_schema)
    return DataFile(name, rows, size)


def write(url: str, name: str, tables: Iterable[pa.Table], table_schema: pa.Schema) -> None:
    """Write one file and add it to the table."""
    append(url, table_schema, [write_file(url, name, tables, table_schema)])


def _commit(
    url: str, table_schema: pa.Schema, files: list[DataFile], mode: str, note: Mapping[str, str]
) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            _try_to_commit(url, table_schema, files, mode, dict(note))
            return
        except (CommitFailedError, DeltaError, OSError) as error:  # overtaken, or the store failed
            if attempt == _ATTEMPTS - 1:
                raise storage.StorageError(f"{url}: its log cannot be written: {error}") from error
        time.sleep(_PAUSE_S * random.uniform(0.5, 1.5) * min(2**attempt, 60))


def _try_to_commit(
    url: str, table_schema: pa.Schema, files: list[DataFile], mode: str, note: dict[str, str]
) -> None:
    log = _open_log(url) or _create(url, table_schema)
    known = set(pa.table(log.get_add_actions(flatten=True))["path"].to_pylist())
    wanted = {file.name for file in files}
    if wanted == known or (mode == "append" and wanted < known):
        return  # also where the reply to our own commit got lost
    last = log.transaction_version(_WRITER)
    number = Transaction(_WRITER, 0 if last is None else last + 1)
    log.create_write_transaction(
        [_action(file) for file in files if file.name not in known],
        mode,
        table_schema,
        commit_properties=CommitProperties(custom_metadata=note, app_transactions=[number]),
    )


def _create(url: str, table_schema: pa.Schema) -> DeltaTable:
    fingerprint = (table_schema.metadata or {}).get(schema.FINGERPRINT_KEY)
    properties = {schema.FINGERPRINT_KEY.decode(): fingerprint.decode()} if fingerprint else {}
    return DeltaTable.create(
        _place(url),
        table_schema.remove_metadata(),
        mode="ignore",
        configuration=properties,
        storage_options=storage.delta_options(url),
        raise_if_key_not_exists=False,
    )


def _action(file: DataFile) -> AddAction:
    statistics = json.dumps({"numRecords": file.rows})
    return AddAction(file.name, file.bytes, {}, int(time.time() * 1000), True, statistics)
