"""Which samples a training may use: what the newest selection/ says of their clips, whatever latents/ holds.

A training asks when it starts, when it resumes and when a stage begins.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store import delta_tables, schema, storage
from pipeline.training.state import ranks

_FIELDS = ["clip_id", "keep", "split", "reject_reason"]


def open_selection(data_url: str, version: int | None = None) -> delta_tables.Table:
    """selection/ as it is now or was in a version; ValueError if there is none."""
    table = delta_tables.open_table(storage.join(data_url, schema.SELECTION), version)
    if table is None:
        raise ValueError(f"data: {data_url} has no selection/; run filter first")
    return table


def newest_version(data_url: str) -> int:
    """The version of selection/ as rank 0 finds it, on every rank."""
    return ranks.from_rank_0(open_selection(data_url).version if ranks.rank() == 0 else None)


def reasons(samples: pa.Table, data_url: str, version: int, split: str) -> pa.Array:
    """Why each of these rows of the sample table may not be used for a split; null where it may."""
    selection = open_selection(data_url, version).read(_FIELDS)
    places = pc.index_in(samples["clip_id"].combine_chunks(), value_set=selection["clip_id"].combine_chunks())
    found = selection.take(places)
    rejected = pc.list_element(pc.split_pattern(found["reject_reason"], ":", max_splits=1), 0)
    return pc.case_when(
        pc.make_struct(
            pc.is_null(found["keep"]),
            pc.invert(found["keep"].fill_null(False)),
            pc.not_equal(found["split"], split).fill_null(True),
        ),
        "not in selection/",
        pc.coalesce(rejected, "rejected"),
        pc.coalesce(pc.binary_join_element_wise("now", found["split"], " "), "without a split"),
    ).combine_chunks()


def allowed(samples: pa.Table, data_url: str, version: int, split: str, stage_name: str) -> np.ndarray:
    """Whether each of these rows may be used for a split, `(rows,)` bool; rank 0 prints how many may not.

    ValueError if none may.
    """
    why = reasons(samples, data_url, version, split)
    counts = Counter(why.drop_null().to_pylist())
    idle = sum(counts.values())
    if idle and ranks.rank() == 0:
        told = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        print(
            f"stage {stage_name}: {idle} of {len(why)} {split} samples are idle, as selection/ (version "
            f"{version}) says: {told}",
            flush=True,
        )
    if idle == len(why):
        raise ValueError(f"stages.{stage_name}: selection/ (version {version}) allows no {split} sample")
    return why.is_null().to_numpy(zero_copy_only=False)


def usable(
    train: pa.Table, held_out: pa.Table, data_url: str, version: int, stage_name: str
) -> tuple[np.ndarray, pa.Table]:
    """Which rows of the one may be trained on, `(rows,)` bool, and the rows of the other that may be used."""
    held_out_allowed = allowed(held_out, data_url, version, "held_out", stage_name)
    return allowed(train, data_url, version, "train", stage_name), held_out.filter(pa.array(held_out_allowed))
