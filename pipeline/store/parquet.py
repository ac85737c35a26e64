"""Parquet files: written as whole objects, read by the columns and row groups that are asked for."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.storage import open_ranges, reading, whole_file

_FILES_AHEAD, _BYTES_AHEAD = 16, 2 * 2**20


def write_table(url: str, tables: Iterable[pa.Table], schema: pa.Schema) -> tuple[int, int]:
    """Write one Parquet file whose row groups are the given tables, as one complete object: (bytes, rows)."""
    rows = 0
    with whole_file(url) as path:
        with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, table.num_rows))
                rows += table.num_rows
        size = os.path.getsize(path)
    return size, rows


def read_table(url: str, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
    """One Parquet file as a table, or one of its row groups."""

    def read() -> pa.Table:
        with open_ranges(url) as file:
            opened = pq.ParquetFile(file, pre_buffer=True)
            if row_group is None:
                return opened.read(columns=columns)
            return opened.read_row_group(row_group, columns=columns)

    return reading(url, read)


def read_tables(files: Iterable[tuple[str, int]], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """One file's rows after the other's, without their metadata; some files are read ahead.

    files: the URL and the bytes of each, by which memory is bounded.
    """

    def read(url: str) -> pa.Table:
        return read_table(url, columns).replace_schema_metadata()

    waiting: deque[tuple[Future[pa.Table], int]] = deque()
    ahead = 0  # bytes
    with ThreadPoolExecutor(_FILES_AHEAD) as pool:
        for url, size in files:
            while waiting and (len(waiting) >= _FILES_AHEAD or ahead + size > _BYTES_AHEAD):
                first, its_size = waiting.popleft()
                ahead -= its_size
                yield first.result()
            waiting.append((pool.submit(read, url), size))
            ahead += size
        while waiting:
            yield waiting.popleft()[0].result()


def read_metadata(url: str) -> pq.FileMetaData:
    """A Parquet file's footer: rows of each row group, the schema's metadata."""

    def read() -> pq.FileMetaData:
        with open_ranges(url) as file:
            return pq.read_metadata(file)

    return reading(url, read)


def read_schema(url: str) -> pa.Schema:
    """A Parquet file's schema, with its metadata."""
    return read_metadata(url).schema.to_arrow_schema()
