"""The report of a run: every picture is there, names cannot inject markup, missing numbers are dashes."""

import html.parser
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest

from demo import report_plots, results
from demo.report import metric_table, stage_table, training_tables
from pipeline.evaluation.synthetic_pairs import write_lossless
from pipeline.store import delta_tables, schema, storage
from tests.helpers.tiny_models import save_vae

HOSTILE = "<img src=x onerror=alert(1)>_\"'&_0"
FRAMES, HEIGHT, WIDTH = 6, 32, 48


class Page(html.parser.HTMLParser):
    """Collects the images, scripts and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def stage_row(**values: Any) -> dict[str, Any]:
    row = {"stage": "filter", "rows_in": 9, "rows_kept": 6, "rejected": {"blur": 2}, "errors": 1}
    return {**row, "seconds": 12.3, "startup_s": 4.5, "peak_memory_bytes": 3 << 30, **values}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a demo leaves, small: one hostile clip in pairs and restored, scores, histories, a metric."""
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES, HEIGHT, WIDTH, 3)).astype(np.uint8)
    file = "clip 1%#.mkv"
    for kind in ("pairs/hq", "pairs/lq", "restored"):
        write_lossless(f"file://{tmp_path}/{kind}/{file}", frames, 25.0, False)
    pair = {"name": HOSTILE, "file": file, "media": "video", "frames": FRAMES}
    failed = {"name": "gone", "error": "does not decode"}
    storage.write_json(f"file://{tmp_path}/pairs/manifest.json", {"seed": 0, "pairs": [pair, failed]})
    table_schema = schema.scores_schema(["blur", "never_computed"])
    rows = [{"clip_id": str(i), "blur": float(i), "never_computed": None, "error": None} for i in range(9)]
    table = pa.Table.from_pylist(rows, schema=table_schema)
    delta_tables.write(f"file://{tmp_path}/data/scores", "part.parquet", [table], table_schema)
    save_vae(tmp_path / "data" / "weights" / "vae")
    for model in ("vae", "dit"):
        steps = [{"step": i, "stage": "5x64x64", "loss": 1 / i} for i in range(1, 5)]
        held_out = [{"stage": "5x64x64", "before": 2.0, "after": 1.5, "set_hash": "abc123", "triples": 7}]
        history = {"steps": steps, "held_out": held_out}
        storage.write_json(f"file://{tmp_path}/data/weights/{model}/history.json", history)
    means = [{"method": "LQ", "clips": 1, "errors": 0, "psnr_y": {"mean": 21.5, "standard_error": None}}]
    storage.write_json(f"file://{tmp_path}/evaluation/evaluation.json", {"means": means})
    return tmp_path


def test_a_run_becomes_a_page_whose_pictures_are_all_there(run_folder: Path) -> None:
    results.collect(run_folder, [stage_row()], {"seconds": 90.0, "peak_memory_bytes": 5 << 30}, short=True)
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    sources = [unquote(image["src"] or "") for image in page.images]
    assert all((run_folder / source).stat().st_size > 0 for source in sources)
    assert all(image.get("alt") for image in page.images)
    # 1 score that has values, the contact sheet, 2 curves, 4 versions side by side, 3 in the slider
    assert len(sources) == 1 + 1 + 2 + 4 + 3
    assert "1.5 minutes" in page.text and "5.00 GiB" in page.text and "21.50" in page.text


def test_a_hostile_clip_name_is_text_and_nothing_else(run_folder: Path) -> None:
    results.collect(run_folder, [stage_row()], {"seconds": 9.0, "peak_memory_bytes": 1}, short=False)
    page = Page((run_folder / "report.html").read_text())
    assert HOSTILE in page.text
    assert page.handlers == []


def test_the_summary_holds_stages_training_metrics_and_machine(run_folder: Path) -> None:
    results.collect(run_folder, [stage_row()], {"seconds": 9.0, "peak_memory_bytes": 1}, short=True)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["training"]["dit"]["steps"] == 4
    assert summary["training"]["dit"]["held_out"][0]["set_hash"] == "abc123"
    assert summary["metrics"][0]["method"] == "LQ"
    assert summary["stages"][0]["rejected"] == {"blur": 2}
    assert summary["short"] is True and summary["machine"]["cpus"] >= 1


def test_a_run_that_left_nothing_still_has_a_page(tmp_path: Path) -> None:
    results.collect(tmp_path, [], {"seconds": 1.0, "peak_memory_bytes": 0}, short=True)
    page = Page((tmp_path / "report.html").read_text())
    assert page.images == []
    assert "No clip was restored." in page.text


def test_no_placeholder_is_left_in_the_visible_page(run_folder: Path) -> None:
    results.collect(run_folder, [stage_row()], {"seconds": 9.0, "peak_memory_bytes": 1}, short=True)
    body = (run_folder / "report.html").read_text().split("<body>")[1].split("<script>")[0]
    assert "{" not in body and "None" not in body and "nan" not in body


def test_tables_name_reasons_changes_and_missing_values() -> None:
    stages = stage_table([stage_row(), stage_row(stage="pairs", rejected={}, startup_s=None)])
    assert "blur: 2" in stages and "3.00" in stages and "–" in stages
    held_out = [{"stage": "a", "before": 2.0, "after": 1.0, "set_hash": "h", "crops": 3}]
    assert "-50.0 %" in training_tables({"vae": {"steps": 3, "held_out": held_out}})
    two = [
        {"method": "a", "clips": 1, "niqe": {"mean": 5.25, "standard_error": 0.5}},
        {"method": "b", "clips": 1},
    ]
    assert "5.25 ± 0.50" in metric_table(two) and "PSNR" not in metric_table(two)


def test_contact_sheet_keeps_the_truth_left_of_the_degraded() -> None:
    red, blue = (np.full((60, 80, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = report_plots.contact_sheet([(red, blue)])
    middle = sheet[sheet.shape[0] // 2]
    first_red, first_blue = (
        np.flatnonzero((middle == colour).all(1))[0] for colour in ((255, 0, 0), (0, 0, 255))
    )
    assert first_red < first_blue


def test_thresholds_are_read_from_the_filter_config(tmp_path: Path) -> None:
    config = tmp_path / "filter.yaml"
    config.write_text("thresholds:\n  blur: {min: 1.5, max: null}\n")
    assert results.filter_thresholds(config) == {"blur": {"min": 1.5, "max": None}}
