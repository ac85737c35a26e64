import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.dit.swin_mmdit import SD3_MEDIUM
from pipeline.store import hashing, schema
from pipeline.training.samples import latent_reader, pack_balance, sample_order
from pipeline.training.samples.sample_order import SampleStream, pack_step
from tests.helpers.tiny_models import DIT

SIZES = [(1, 64, 64), (5, 64, 64), (9, 96, 96), (13, 128, 128)]


def index(count: int, sizes=SIZES, rows_per_file: int = 8) -> pa.Table:
    """Rows of an index: samples of the sizes in turn, in row groups of two."""
    rows = []
    for i in range(count):
        frames, height, width = sizes[i % len(sizes)]
        rows.append(
            schema.empty_row(
                schema.INDEX_SCHEMA,
                sample_id=hashing.stable_id(i),
                bucket="x".join(map(str, sizes[i % len(sizes)])),
                file=f"part-{i // rows_per_file}.parquet",
                row_group=i % rows_per_file // 2,
                row=i % 2,
                num_frames=frames,
                height=height,
                width=width,
                video_tokens=schema.video_tokens(frames, height, width),
                text_tokens=3 + i % 5,
            )
        )
    return pa.Table.from_pylist(rows, schema=schema.INDEX_SCHEMA)


def stream_of(rows: pa.Table, seed: int) -> SampleStream:
    return SampleStream(latent_reader.sample_table(rows), seed, DIT)


def take(stream, steps, packs_per_step=4, budget=600, position=0):
    taken = []
    for _ in range(steps):
        packed = pack_step(stream, position, packs_per_step, budget)
        taken.append([[stream[one] for one in pack] for pack in packed.packs])
        position = packed.next_position
    return taken, position


def ids(stream, count, first=0):
    return [stream.rows["sample_id"][i].as_py() for i in stream.numbers(first, count)]


def test_every_sample_comes_once_in_each_epoch_and_nothing_is_dropped():
    rows = index(37)
    steps, position = take(stream_of(rows, seed=3), 12)
    drawn = sorted((one.epoch, one.row["sample_id"]) for packs in steps for pack in packs for one in pack)
    assert len(drawn) == position > 3 * 37
    for epoch in range(position // 37):
        assert sorted(i for e, i in drawn if e == epoch) == sorted(rows["sample_id"].to_pylist())
    assert len(set(drawn)) == len(drawn)


def test_epochs_and_seeds_give_other_orders():
    rows = index(50)
    stream = stream_of(rows, seed=3)
    first, second = ids(stream, 50), ids(stream, 50, first=50)
    assert sorted(first) == sorted(second) and first != second
    assert first != ids(stream_of(rows, seed=4), 50)


def test_large_data_is_read_row_group_by_row_group(monkeypatch):
    """Within a window that a reader keeps, and each window once."""
    monkeypatch.setattr(sample_order, "_WINDOW_TOKENS", 2000)
    stream = stream_of(index(400), seed=0)
    groups = stream.localities[stream.numbers(0, 400)].tolist()
    lengths = [max(i for i, g in enumerate(groups) if g == one) - groups.index(one) for one in set(groups)]
    assert max(lengths) < 60  # positions between the first and the last sample of a row group
    assert groups != sorted(groups)


def test_the_order_and_the_packs_are_the_recorded_ones(monkeypatch):
    """As version 0.1.0 drew them: checkpoints that it wrote go on in the same order."""
    monkeypatch.setattr(sample_order, "_WINDOW_TOKENS", 500)
    stream = stream_of(index(21), seed=5)
    assert stream.numbers(0, 42).tolist() == [
        *[5, 2, 3, 4, 14, 12, 0, 17, 16, 20, 15, 13, 1, 19, 18, 9, 8, 7, 6, 11, 10],
        *[10, 0, 1, 11, 2, 3, 13, 15, 14, 12, 7, 20, 5, 4, 16, 6, 17, 9, 18, 8, 19],
    ]
    packs, position = [], 0
    for _ in range(3):
        packed = pack_step(stream, position, 2, 600)
        packs.append(packed.packs)
        position = packed.next_position
    assert packs == [
        [[2, 1, 11, 7, 5, 6], [10, 4, 0, 3, 12, 8, 9]],
        [[13, 14, 18, 15], [17, 19, 16]],
        [[26, 25, 20, 21], [24, 28, 27, 23, 22]],
    ]


def test_the_order_knows_nothing_of_files():
    """A reference may be anything, and the numbers of localities may have gaps."""
    rows = latent_reader.sample_table(index(41))
    other = rows.drop_columns(["reference", "locality"])
    other = other.append_column("reference", pa.array([f"anything {i}" for i in range(41)]))
    other = other.append_column("locality", pa.array(7 * rows["locality"].to_numpy() + 3))
    files, opaque = SampleStream(rows, 1, DIT), SampleStream(other, 1, DIT)
    assert ids(opaque, 100) == ids(files, 100)
    assert pack_step(opaque, 9, 4, 600) == pack_step(files, 9, 4, 600)
    assert opaque[3].row["reference"].startswith("anything")


def test_resuming_at_a_step_gives_the_steps_that_would_have_followed():
    rows = index(41)
    undisturbed, _ = take(stream_of(rows, seed=1), 10)
    _, position = take(stream_of(rows, seed=1), 4)
    reverse = rows.take(pa.array(range(40, -1, -1)))
    resumed, _ = take(stream_of(reverse, seed=1), 6, position=position)
    assert resumed == undisturbed[4:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(256, 2000), st.integers(0, 9))
def test_packs_are_never_empty_nor_above_the_budget(count, packs, budget, seed):
    steps, position = take(stream_of(index(count), seed), 5, packs, budget)
    for step in steps:
        loads = [sum(one.tokens for one in pack) for pack in step]
        assert min(loads) > 0 and max(loads) <= budget
    assert position == sum(len(pack) for step in steps for pack in step)


def test_a_budget_below_the_largest_sample_is_one_clear_error():
    with pytest.raises(ValueError, match=r"stages\.big: tokens_per_pack is 100.*13x128x128.*256 tokens"):
        sample_order.check_budget(index(8), 100, "big")


def paper_index(count: int) -> pa.Table:
    """Two images of 0.25 to 1 MP for each 720p video of 5 to 21 frames, captions of all lengths."""
    draw = np.random.default_rng(0)
    video = draw.random(count) < 1 / 3
    pixels = np.exp(draw.uniform(np.log(0.25e6), np.log(1.05e6), count))
    aspect = draw.choice([1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3], count)
    height = np.where(video, 720, np.sqrt(pixels / aspect) // 16 * 16).astype(np.int32)
    width = np.where(video, 1280, np.sqrt(pixels * aspect) // 16 * 16).astype(np.int32)
    frames = np.where(video, 4 * draw.integers(1, 6, count) + 1, 1).astype(np.int32)
    numbers = np.arange(count)
    columns = {
        "sample_id": np.char.mod("%016d", numbers),
        "bucket": np.full(count, "native"),
        "file": np.char.mod("part-%07d.parquet", numbers // 64),
        "row_group": (numbers % 64 // 4).astype(np.int32),
        "row": (numbers % 4).astype(np.int32),
        "num_frames": frames,
        "height": height,
        "width": width,
        "video_tokens": ((frames - 1) // 4 + 1) * (height // 16) * (width // 16),
        "text_tokens": draw.integers(20, 300, count).astype(np.int32),
    }
    return pa.table(columns)


def test_ranks_get_equal_work_at_the_papers_scale():
    stream = SampleStream(latent_reader.sample_table(paper_index(100_000)), 0, SD3_MEDIUM)
    found, position = [], 0
    for _ in range(8):
        packed = pack_step(stream, position, packs_per_step=256, tokens_per_pack=151_000)
        found.append(packed.imbalance(256))
        position = packed.next_position
        numbers = stream.numbers(0, packed.next_position)
        full = [stream.tokens[numbers[pack]].sum() for pack in packed.packs]
        assert max(full) <= 151_000 and np.mean(full) > 0.9 * 151_000
    print(f"(max - mean) / mean between 256 ranks: mean {np.mean(found):.4f}, worst {max(found):.4f}")
    assert np.mean(found) <= 0.05


def test_packs_are_balanced_by_cost_and_not_by_tokens():
    costs, tokens = np.array([4.0, 1, 1, 1, 1, 1]), np.array([2, 1, 1, 1, 1, 1])
    packs = pack_balance.fill_packs(costs, tokens, np.arange(6), packs=2, tokens_per_pack=4)
    assert sorted(packs[0] + packs[1]) == list(range(5))
    assert sorted(costs[pack].sum() for pack in packs) == [4, 4]
