"""Reading samples back: the right rows of the right files, each read about once."""

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import training_readers
from model.dit.swin_mmdit import TINY
from pipeline.training.samples import latent_reader, sample_order


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    url = f"file://{tmp_path_factory.mktemp('data')}"
    training_readers.write_latents(url, 80)
    return url


def test_samples_and_texts_come_back_as_written(root):
    reader = latent_reader.LatentReader(root)
    for row in latent_reader.read_index(root).slice(0, 80).to_pylist()[::13]:
        wanted = training_readers.make_sample(int(row["sample_id"]))
        hq, lq = reader.latents(row, 0)
        assert torch.equal(hq, wanted["hq"].float()) and torch.equal(lq, wanted["lq"].float())
        tokens, pooled = reader.prompt(row["clip_id"], (False, False, False))
        assert torch.equal(tokens[40:], wanted["t5"].float())
        assert torch.equal(pooled[:768], wanted["pooled_l"].float())


def test_samples_of_one_row_group_are_one_locality(root):
    """In the order in which they are stored, however the index comes."""
    rows = latent_reader.read_index(root).to_pylist()
    places = [(row["reference"]["file"], row["reference"]["row_group"]) for row in rows]
    assert places == sorted(places)
    groups = list(dict.fromkeys(places))
    assert [row["locality"] for row in rows] == [groups.index(place) for place in places]
    assert not {"file", "row_group", "row"} & set(rows[0])


def test_a_stage_keeps_to_the_files_that_it_began_with(root):
    table = latent_reader.read_index(root)
    files = latent_reader.files_of(table)
    assert files == ["part-000000.parquet", "part-000064.parquet"]
    first = latent_reader.of_files(table, files[:1])
    assert len(first) == 64 and latent_reader.files_of(first) == files[:1]
    with pytest.raises(ValueError, match=r"^data: latents/ lacks 1 files .*gone\.parquet"):
        latent_reader.of_files(table, ["gone.parquet", *files])


def test_a_clip_without_text_is_named(root):
    with pytest.raises(ValueError, match=r"^text/ has no clip 123456"):
        latent_reader.LatentReader(root).text("123456")


def test_an_epoch_reads_each_row_group_once(root, monkeypatch):
    reader = latent_reader.LatentReader(root)
    stream = sample_order.SampleStream(latent_reader.read_index(root), 0, TINY)
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda *given, **k: read.append(1) or original(*given, **k),
    )
    for position in range(len(stream)):
        reader.latents(stream[position].row, 0)
    assert len(read) == len(set(stream.localities)) < len(stream) / 5
