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


def newest_version(data_url: str) -> int:
    """The version of selection/ as rank 0 finds it, on every rank; ValueError if there is none."""
    table = delta_tables.open_table(storage.join(data_url, schema.SELECTION)) if ranks.rank() == 0 else None
    version = ranks.from_rank_0(table and table.version)
    if version is None:
        raise ValueError(f"data: {data_url} has no selection/; run filter first")
    return version


def reasons(samples: pa.Table, data_url: str, version: int, split: str) -> pa.Array:
    """Why each of these rows of the sample table may not be used for a split; null where it may."""
    table = delta_tables.open_table(storage.join(data_url, schema.SELECTION), version)
    assert table is not None
    selection = table.read(_FIELDS)
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
        rejected,
        pc.binary_join_element_wise("now", found["split"], " "),
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
