"""Parquet files, and the folders of them that are tables."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.storage import open_input, reading, walk, whole_file


def write_table(url: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write one Parquet file whose row groups are the given tables, as one complete object."""
    with (
        whole_file(url) as path,
        pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def read_table(url: str, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
    """One Parquet file as a table, or one of its row groups."""

    def read() -> pa.Table:
        with open_input(url) as file:
            opened = pq.ParquetFile(file)
            if row_group is None:
                return opened.read(columns=columns)
            return opened.read_row_group(row_group, columns=columns)

    return reading(url, read)


def read_metadata(url: str) -> pq.FileMetaData:
    """A Parquet file's footer: rows of each row group, the schema's metadata."""

    def read() -> pq.FileMetaData:
        with open_input(url) as file:
            return pq.read_metadata(file)

    return reading(url, read)


def read_schema(url: str) -> pa.Schema:
    """A Parquet file's schema, with its metadata."""
    return read_metadata(url).schema.to_arrow_schema()


def parquet_files(url: str) -> list[str]:
    """The data files of a table's folder (names that start with '_' or '.' are not data), sorted."""
    url = url if "://" in url else f"file://{url}"
    files = []
    for file, _, _ in walk(url):
        inner = file.removeprefix(url).lstrip("/")
        if file.endswith(".parquet") and not any(part[0] in "_." for part in inner.split("/")):
            files.append(file)
    return sorted(files)


def read_folder(url: str, columns: list[str] | None = None) -> pa.Table | None:
    """All files of a table's folder as one table; None if there is none."""
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(lambda file: read_table(file, columns), parquet_files(url)))
    if not tables:
        return None
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def count_rows(url: str) -> int:
    """Rows of a table's folder, from the files' footers."""
    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(lambda file: read_metadata(file).num_rows, parquet_files(url)))


def iterate_folder(url: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The files of a table's folder one after the other: memory does not grow with the table."""
    for file in parquet_files(url):
        yield read_table(file, columns)
