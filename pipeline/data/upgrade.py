"""A data root of version 0.1.0, whose tables are folders of files: give each its log."""

import dataclasses

from pipeline.runtime import work_plan
from pipeline.store import delta_tables, parquet, schema, storage
from pipeline.store.urls import Url, check_urls


@dataclasses.dataclass(frozen=True)
class UpgradeConfig:
    """What `jobs.upgrade` reads."""

    data: Url
    """Absolute URL of a data root that version 0.1.0 wrote; its files stay, and each table gets a log."""

    def __post_init__(self) -> None:
        check_urls(self)


def check_upgraded(data_url: str) -> None:
    """ValueError if the data root is one of version 0.1.0."""
    clips = storage.join(data_url, schema.CLIPS)
    logs = (clips, storage.join(clips, work_plan.PLANS))
    if any(delta_tables.open_table(url) is not None for url in logs):
        return
    if any(url.endswith(".parquet") for url, _, _ in storage.files_in(clips)):
        raise ValueError(
            f"data: {data_url} is of version 0.1.0; run once: python -m jobs.upgrade --data {data_url}"
        )


def run(config: UpgradeConfig) -> None:
    """Make every table of the data root one of Delta Lake; running again does what is missing."""
    learned = storage.join(config.data, schema.LEARNED)
    tables = [
        *(storage.join(config.data, name) for name in (schema.SCORES, schema.SELECTION, schema.TEXT)),
        *(storage.join(learned, name) for name in storage.folders_in(learned)),
        storage.join(config.data, schema.LATENTS, schema.INDEX),
        storage.join(config.data, schema.LATENTS),
        storage.join(config.data, schema.CLIPS),  # the last: what is not upgraded is told by it
    ]
    for url in tables:
        _upgrade_plans(storage.join(url, work_plan.PLANS))
        files = _adopt(url)
        print(f"{url}: {files} file{'' if files == 1 else 's'}", flush=True)


def _names(folder_url: str) -> list[str]:
    names = (url.rsplit("/", 1)[1] for url, _, _ in storage.files_in(folder_url))
    return sorted(name for name in names if name.endswith(".parquet") and name[0] not in "._")


def _adopt(url: str) -> int:
    """Let the files in a folder be a table, unless it is one; returns their number."""
    table = delta_tables.open_table(url)
    names = _names(url)
    if table is not None and table.version > 0:
        return len(table.files)
    if names:
        files = delta_tables.whole_files(url, names)
        delta_tables.append(url, parquet.read_schema(storage.join(url, names[0])), files)
    return len(names)


def _upgrade_plans(url: str) -> None:
    """Plans get names that say how many shards they have; the files under their former names go."""
    former = [name for name in _names(url) if "-" not in name]
    for name in former:
        file = storage.join(url, name)
        shards = parquet.read_metadata(file).num_row_groups
        renamed = work_plan.plan_file(name.removesuffix(".parquet"), shards)
        storage.write_bytes(storage.join(url, renamed), storage.read_bytes(file))
        storage.remove_file(file)
    _adopt(url)
