"""The paper's numbers are all there, and stand beside a new row with the best marked."""

import pytest

from pipeline.evaluation import benchmark_sets, comparison_tables, published


def test_all_numbers_of_all_tables_are_there():
    count = {table: sum(row["table"] == table for row in published.numbers()) for table in (1, 2, 3, 4)}
    assert count == {1: 4 * 8 * 8 + 2 * 4 * 8, 2: 8 * 8 - 2, 3: 8, 4: 9} and count[1] == 320
    methods = {row["method"] for row in published.numbers() if row["table"] == 1}
    assert len(methods) == 8 and len(published.datasets()) == 6
    keys = [
        tuple(row[key] for key in ("table", "dataset", "method", "metric")) for row in published.numbers()
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("dataset", "method", "metric", "value"),
    [
        ("SPMCS", "Real-ESRGAN", "psnr", 22.55),
        ("UDM10", "SeedVR", "dists", 0.116),
        ("REDS30", "MGLD-VSR", "lpips", 0.271),
        ("YouHQ40", "Upscale-A-Video", "musiq", 64.45),
        ("VideoLQ", "VEnhancer", "dover_technical_x100", 8.719),
        ("AIGC38", "SeedVR", "dover_technical_x100", 13.424),
        ("VAE", "SeedVR", "rfvd", 1.85),
        ("VAE", "CogVideoX", "psnr", 34.30),
        ("training", "1x8x8", "seconds_per_iteration", 455.49),
        ("YouHQ40", "5x64x64", "dover_technical_x100", 11.595),
    ],
)
def test_numbers_are_the_papers(dataset, method, metric, value):
    wanted = {"dataset": dataset, "method": method, "metric": metric}
    (row,) = [row for row in published.numbers() if wanted.items() <= row.items()]
    assert row["value"] == value


def new_row(**values: float) -> dict:
    row = {"method": "new", "clips": 10, "errors": 0}
    for metric in published.METRICS:
        row[metric] = {"mean": values.get(metric), "standard_error": None, "clips": 10}
    return row


def test_a_new_row_stands_beside_them_best_and_second_marked():
    table = [*published.rows_of("UDM10", published.METRICS), new_row(psnr_rgb=30.0, lpips=0.25)]
    text = comparison_tables.markdown_means(table, published.METRICS, "")
    (new,) = [line for line in text.splitlines() if line.startswith("| new")]
    assert "**30.00**" in new and "<u>0.250</u>" in new
    (ours,) = [line for line in text.splitlines() if line.startswith("| SeedVR")]
    assert "**0.231**" in ours and "**0.116**" in ours
    latex = comparison_tables.latex_means(table, published.METRICS, "")
    assert "\\textbf{30.00}" in latex and "\\underline{0.250}" in latex and "PSNR RGB $\\uparrow$" in latex
    assert all(line.count("&") == 8 for line in latex.splitlines() if "&" in line)
    html = comparison_tables.html_means(table, published.METRICS, "")
    assert "<b>30.00</b>" in html and html.count("<tr>") == 10


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(ValueError, match="'UDM9' is none of the paper's sets: SPMCS, UDM10"):
        published.rows_of("UDM9", published.METRICS)


def test_every_set_of_the_paper_is_described_and_checked():
    for name in published.datasets():
        described = benchmark_sets.load(name)
        assert described.source.startswith("https://") and described.made_from and described.licence
    with pytest.raises(ValueError, match=r"UDM10 has 10 clips .* here are 9"):
        benchmark_sets.check("UDM10", 9, has_truth=True)
    with pytest.raises(ValueError, match="VideoLQ has no truth"):
        benchmark_sets.check("VideoLQ", 50, has_truth=True)
    with pytest.raises(ValueError, match="benchmark: 'UDM9' is none of SPMCS"):
        benchmark_sets.load("UDM9")
