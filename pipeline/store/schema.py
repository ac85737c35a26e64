"""Every table that a stage writes: its columns, units and file layout, in one place.

A clip passes through clips -> scores -> selection -> text + latents. All tables are Parquet. A table's
`fingerprint` metadata is a hash of what determines the content of its rows (contract version, model hashes,
recipe, seed, sampling), so that rows of two kinds never mix.
"""

from typing import Any

import pyarrow as pa

# Folder names below a data root.
CLIPS, SCORES, SELECTION, TEXT, LATENTS = "clips", "scores", "selection", "text", "latents"
LEARNED = "learned_scores"
INDEX = "_index"
SUMMARY = "_summary.json"
FINGERPRINT_KEY = b"openseedvr.fingerprint"

TEMPORAL_FACTOR = 4  # pixels frames 4n+1 <-> latent frames n+1
SPATIAL_FACTOR = 8
PATCH = 2  # latent pixels per token side
MAX_ROW_GROUP_SAMPLES = 64
MAX_ROW_GROUP_BYTES = 4 * 1024**2  # a reader of one sample reads all of them


def _fields(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


CLIPS_SCHEMA = _fields(
    clip_id=pa.string(),
    uri=pa.string(),
    source_id=pa.string(),
    source_bytes=pa.int64(),
    source_etag=pa.string(),
    media=pa.string(),  # video | image
    start_pts=pa.int64(),  # in time_base ticks, inclusive
    end_pts=pa.int64(),  # exclusive
    time_base=pa.string(),  # "1/12288"
    start_s=pa.float64(),
    end_s=pa.float64(),
    num_frames=pa.int32(),
    fps=pa.float64(),
    vfr=pa.bool_(),
    width=pa.int32(),  # as displayed, after rotation, square pixels
    height=pa.int32(),
    rotation=pa.int32(),  # degrees, clockwise, already applied to width and height
    sample_aspect=pa.string(),
    interlaced=pa.bool_(),
    codec=pa.string(),
    pix_fmt=pa.string(),
    bit_depth=pa.int32(),
    color_primaries=pa.string(),
    color_transfer=pa.string(),
    bit_rate=pa.int64(),  # bits per second
    has_audio=pa.bool_(),
    phash=pa.string(),  # 16 hex digits, of the clip's middle frame
    caption=pa.string(),
    license=pa.string(),
    dataset=pa.string(),
    error=pa.string(),
)

SELECTION_SCHEMA = _fields(
    clip_id=pa.string(),
    keep=pa.bool_(),
    reject_reason=pa.string(),
    duplicate_of=pa.string(),
    split=pa.string(),  # train | held_out
)

# Each large_binary has a `_shape` column; raw little-endian bf16, in token order, never padded.
TEXT_SCHEMA = _fields(
    clip_id=pa.string(),
    clip_l=pa.large_binary(),
    clip_l_shape=pa.list_(pa.int32()),
    clip_g=pa.large_binary(),
    clip_g_shape=pa.list_(pa.int32()),
    t5=pa.large_binary(),
    t5_shape=pa.list_(pa.int32()),
    pooled_l=pa.large_binary(),
    pooled_l_shape=pa.list_(pa.int32()),
    pooled_g=pa.large_binary(),
    pooled_g_shape=pa.list_(pa.int32()),
    error=pa.string(),
)

LATENTS_SCHEMA = _fields(
    sample_id=pa.string(),
    clip_id=pa.string(),
    media=pa.string(),
    num_frames=pa.int32(),  # of pixels, 4n+1
    height=pa.int32(),
    width=pa.int32(),
    hq_latent=pa.large_binary(),  # bf16, (T', H', W', C), scaled
    hq_latent_shape=pa.list_(pa.int32()),
    lq_latent=pa.large_binary(),
    lq_latent_shape=pa.list_(pa.int32()),
    degradation=pa.string(),  # JSON: every drawn parameter and measured bit rate
    crop=pa.list_(pa.int32()),  # first frame, top, left (in the clip's displayed frames)
    seed=pa.int64(),
    error=pa.string(),
)

INDEX_SCHEMA = _fields(
    sample_id=pa.string(),
    clip_id=pa.string(),
    split=pa.string(),
    media=pa.string(),
    file=pa.string(),  # relative to latents/
    row_group=pa.int32(),
    row=pa.int32(),  # within the row group
    bucket=pa.string(),
    num_frames=pa.int32(),
    height=pa.int32(),
    width=pa.int32(),
    video_tokens=pa.int32(),
    text_tokens=pa.int32(),
)


def scores_schema(score_names: list[str]) -> pa.Schema:
    """clip_id, one float64 column per score (null = not computed), error."""
    scores = [pa.field(name, pa.float64()) for name in score_names]
    return pa.schema([pa.field("clip_id", pa.string()), *scores, pa.field("error", pa.string())])


# Scoring networks and their columns. A clip rejected by its weight-free scores gets none of them.
LEARNED_SCORES = {
    "aesthetic": ("aesthetic",),
    "clip_iqa": ("clip_iqa",),
    "fast_vqa": ("fast_vqa",),
    "musiq": ("musiq",),
    "dover": ("dover_technical", "dover_aesthetic", "dover_overall"),
}

LEARNED_MEANINGS = {
    "aesthetic": "LAION-Aesthetics: how much people like the picture, about 1 to 10",
    "clip_iqa": "CLIP-IQA: good photo rather than bad photo, 0 to 1",
    "fast_vqa": "FAST-VQA: quality of the video, 0 to 1",
    "musiq": "MUSIQ: quality of the picture, about 0 to 100 (1 to 10 with the AVA weights)",
    "dover_technical": "DOVER: technical quality of the video, 0 to 1",
    "dover_aesthetic": "DOVER: aesthetic quality of the video, 0 to 1",
    "dover_overall": "DOVER: both, 0 to 1",
}

# Lies in learned_scores/<scorers>/, a folder for each set of scorers ("clip_iqa-<fingerprint>.musiq-<...>")
# that clips were given at once; the others' columns are null. A clip has at most one row in each.
LEARNED_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        *[pa.field(column, pa.float64()) for columns in LEARNED_SCORES.values() for column in columns],
        pa.field("error", pa.string()),
    ]
)


def with_fingerprint(schema: pa.Schema, fingerprint: str, **metadata: str) -> pa.Schema:
    """The schema with the fingerprint and further key/value metadata of a table's files."""
    extra = {key.encode(): value.encode() for key, value in metadata.items()}
    return schema.with_metadata({FINGERPRINT_KEY: fingerprint.encode(), **extra})


def empty_row(schema: pa.Schema, **values: Any) -> dict[str, Any]:
    """A row of nulls with the given values: what an error row is made from."""
    row: dict[str, Any] = dict.fromkeys(schema.names)
    unknown = set(values) - set(row)
    assert not unknown, f"not columns of this table: {sorted(unknown)}"
    return {**row, **values}


def video_tokens(num_frames: int, height: int, width: int) -> int:
    """Transformer tokens of a clip of pixels: ((T-1)/4+1) * ceil(H/16) * ceil(W/16)."""
    side = SPATIAL_FACTOR * PATCH
    return ((num_frames - 1) // TEMPORAL_FACTOR + 1) * -(-height // side) * -(-width // side)


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (T, H, W) of a sample of pixels: 4n+1 frames, sides that are multiples of 16."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
