"""Tables of metrics: means with standard errors, as Markdown and HTML, with the best and second marked."""

import html
import math
from typing import Any

from pipeline.metrics import metric_table
from pipeline.runtime import html_page

NOTHING: dict[str, Any] = {"mean": None, "standard_error": None, "clips": 0}


def means(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per method, in the order of first appearance: clips measured, errors, and its metrics.

    A metric is {mean, standard_error, clips} over the clips that have it, with mean null if none has.
    """
    result = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        good = [row for row in own if not row["error"]]
        entry: dict[str, Any] = {"method": method, "clips": len(good), "errors": len(own) - len(good)}
        for metric in metrics:
            entry[metric] = _mean([row[metric] for row in good if row[metric] is not None])
        result.append(entry)
    return result


def _mean(values: list[float]) -> dict[str, Any]:
    count = len(values)
    if not count:
        return dict(NOTHING)
    mean = sum(values) / count
    error = None
    if count > 1:
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return {"mean": mean, "standard_error": error, "clips": count}


def ranks(table: list[dict[str, Any]], metric: str, ceiling: str) -> dict[str, int]:
    """Rank (1, 2, ...) of each method that has the metric; the ceiling does not compete."""
    having = [row for row in table if row[metric]["mean"] is not None and row["method"] != ceiling]
    better = 1 if metric_table.metric(metric).lower_is_better else -1
    ordered = sorted(having, key=lambda row: better * row[metric]["mean"])
    return {row["method"]: place for place, row in enumerate(ordered, start=1)}


def value_text(value: float | None, metric: str) -> str:
    """A metric's value; a dash for none. ValueError for a metric that has no entry in the table."""
    return number_text(value, metric_table.metric(metric).decimals)


def number_text(value: float | None, decimals: int = 3) -> str:
    """A number; a dash for none."""
    return "–" if value is None else f"{value:.{decimals}f}"


def mean_text(entry: dict[str, Any], metric: str) -> str:
    """A mean and its standard error, as in 25.31 ± 0.42."""
    error = entry["standard_error"]
    text = value_text(entry["mean"], metric)
    return text if error is None else f"{text} ± {value_text(error, metric)}"


MARKDOWN = (("**", "**"), ("<u>", "</u>"))
HTML = (("<b>", "</b>"), ("<u>", "</u>"))
LATEX = (("\\textbf{", "}"), ("\\underline{", "}"))
"""Markup around the best and the second."""

Marks = tuple[tuple[str, str], tuple[str, str]]


def marked_cells(
    table: list[dict[str, Any]], metrics: tuple[str, ...], ceiling: str, marks: Marks
) -> list[list[str]]:
    """A text per method and metric, the best and (of three or more) the second marked."""
    places = {metric: ranks(table, metric, ceiling) for metric in metrics}
    return [
        [_marked(mean_text(row[m], m), places[m], row["method"], *marks) for m in metrics] for row in table
    ]


def markdown_means(table: list[dict[str, Any]], metrics: tuple[str, ...], ceiling: str) -> str:
    """The means: best bold, second underlined where there are three or more."""
    lines = [
        "| method | clips | " + " | ".join(metric_table.metric(metric).heading for metric in metrics) + " |",
        "|---|---:|" + "---:|" * len(metrics),
    ]
    for row, cells in zip(table, marked_cells(table, metrics, ceiling, MARKDOWN), strict=True):
        clips = "" if row["clips"] is None else row["clips"]
        lines.append(f"| {row['method']} | {clips} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latex_means(table: list[dict[str, Any]], metrics: tuple[str, ...], ceiling: str) -> str:
    """The same for a paper: a `tabular` (booktabs)."""
    lines = ["\\begin{tabular}{l" + "r" * len(metrics) + "}", "\\toprule"]
    titles = [metric_table.metric(metric).heading for metric in metrics]
    rows = [["method", *titles]]
    cells = marked_cells(table, metrics, ceiling, LATEX)
    rows += [[row["method"], *texts] for row, texts in zip(table, cells, strict=True)]
    for index, row in enumerate(rows):
        lines.append(" & ".join(map(_latex, row)) + " \\\\")
        if index == 0:
            lines.append("\\midrule")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def markdown_costs(costs: dict[str, dict[str, Any] | None]) -> list[str]:
    """Lines of a table of time, memory and size for the methods whose cost is known."""
    known = {method: cost for method, cost in costs.items() if cost}
    if not known:
        return []
    lines = [
        "## What it costs",
        "",
        "| method | s a frame | peak memory GiB | parameters M |",
        "|---|---:|---:|---:|",
    ]
    for method, cost in known.items():
        cells = [
            number_text(cost.get(key)) for key in ("seconds_per_frame", "peak_memory_gib", "parameters_m")
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _latex(text: str) -> str:
    signs = {
        "↑": "$\\uparrow$",
        "↓": "$\\downarrow$",
        "±": "$\\pm$",
        "–": "--",
        "_": "\\_",
        "&": "\\&",
        "%": "\\%",
    }
    return "".join(signs.get(character, character) for character in text)


def html_means(table: list[dict[str, Any]], metrics: tuple[str, ...], ceiling: str) -> str:
    """The same as an HTML table."""
    head = "".join(f"<th>{html.escape(metric_table.metric(metric).heading)}</th>" for metric in metrics)
    rows = []
    for row, cells in zip(table, marked_cells(table, metrics, ceiling, HTML), strict=True):
        clips = "" if row["clips"] is None else row["clips"]
        texts = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{html.escape(row['method'])}</td><td>{clips}</td>{texts}</tr>")
    return f"<table><tr><th>method</th><th>clips</th>{head}</tr>{''.join(rows)}</table>"


def _marked(
    text: str, places: dict[str, int], method: str, best: tuple[str, str], second: tuple[str, str]
) -> str:
    place = places.get(method)
    if len(places) < 2 or place not in (1, 2) or (place == 2 and len(places) < 3):
        return text
    opening, closing = best if place == 1 else second
    return f"{opening}{text}{closing}"


def markdown(result: dict[str, Any], metrics: tuple[str, ...], ceiling: str) -> str:
    """The whole result: means, how they were measured, every clip, every error."""
    lines = ["# Evaluation", "", markdown_means(result["means"], metrics, ceiling), ""]
    lines += ["Mean over clips ± standard error. Best bold, second underlined; the autoencoder's own", ""]
    lines[-2] += " reconstruction is a ceiling and takes no part."
    lines += markdown_costs(result.get("costs", {}))
    lines += ["## How it was measured", ""]
    lines += [f"- {key}: {value}" for key, value in result["protocol"].items()]
    lines += ["", "## Clips", ""]
    lines.append(
        "| method | clip | frames | " + " | ".join(metric_table.metric(m).heading for m in metrics) + " | |"
    )
    lines.append("|---|---|---:|" + "---:|" * len(metrics) + "---|")
    for row in result["clips"]:
        cells = " | ".join(value_text(row[metric], metric) for metric in metrics)
        remark = row["error"] or row["note"] or ""
        lines.append(f"| {row['method']} | {row['clip']} | {row['frames']} | {cells} | {remark} |")
    return "\n".join(lines) + "\n"


def evaluation_page(result: dict[str, Any], metrics: tuple[str, ...], ceiling: str) -> str:
    """The same as one static page without scripts."""
    head = "".join(f"<th>{html.escape(metric_table.metric(metric).heading)}</th>" for metric in metrics)
    clips = []
    for row in result["clips"]:
        cells = "".join(f"<td>{value_text(row[metric], metric)}</td>" for metric in metrics)
        remark = html.escape(row["error"] or row["note"] or "")
        name = f"<td>{html.escape(row['method'])}</td><td>{html.escape(row['clip'])}</td>"
        clips.append(f"<tr>{name}<td>{row['frames']}</td>{cells}<td>{remark}</td></tr>")
    how = "".join(
        f"<li>{html.escape(key)}: {html.escape(str(value))}</li>" for key, value in result["protocol"].items()
    )
    body = (
        f"<h1>Evaluation</h1>{html_means(result['means'], metrics, ceiling)}"
        "<p>Mean over clips ± standard error; best bold, second underlined.</p>"
        f"<h2>How it was measured</h2><ul>{how}</ul><h2>Clips</h2>"
        f"<table><tr><th>method</th><th>clip</th><th>frames</th>{head}<th></th></tr>{''.join(clips)}</table>"
    )
    return html_page.document("Evaluation", body)
