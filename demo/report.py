"""Static page about a run: tables, curves and pictures, readable from a folder without a server.

Nothing is computed here: numbers come as a summary, pictures as files that are already in the folder.
"""

import dataclasses
import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.evaluation import comparison_tables
from pipeline.metrics.metric_table import METRICS, in_order
from pipeline.runtime import html_page

FILES = "report_files"
GIB = 2**30
CEILING = "VAE(truth)"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A file in report_files/ and its alternative text."""

    file: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One restored clip: the same frame in each version; missing versions are left out."""

    name: str
    note: str
    pictures: dict[str, str]
    """version ("LQ", "restored", "VAE(truth)", "truth") -> file in report_files/"""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Everything that the page shows besides numbers."""

    scores: list[Picture]
    pairs: list[Picture]
    losses: list[Picture]
    comparisons: list[Comparison]


SLIDER_VERSIONS = ("LQ", "restored", "truth")

_STYLE = """
.about{background:#f4f6f8;padding:1rem 1.2rem;border-left:4px solid #6a8caf}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:.5rem}.row img{width:100%}
.slider{position:relative;max-width:40rem;margin:1rem 0 0;line-height:0;overflow:hidden}
.slider img{width:100%;display:block}.slider img.over{position:absolute;left:0;top:0;height:100%}
.handle{margin:.3rem 0 0;width:100%;max-width:40rem}
.legend{max-width:40rem;display:flex;justify-content:space-between;font-size:.88em;color:#555}
"""

# Each picture but the last is cut where the next begins: two handles part three versions.
_SCRIPT = """
document.querySelectorAll('.compare').forEach(function (box) {
  var over = [box.querySelector('img.low'), box.querySelector('img.restored')];
  var handles = box.querySelectorAll('input.handle');
  function show() {
    var cuts = Array.prototype.map.call(handles, function (h) { return Number(h.value); });
    cuts.sort(function (a, b) { return a - b; });
    over.forEach(function (img, i) { img.style.clipPath = 'inset(0 ' + (100 - cuts[i]) + '% 0 0)'; });
  }
  handles.forEach(function (h) { h.addEventListener('input', show); });
  show();
});
"""


def write_report(summary: dict[str, Any], pictures: Pictures, folder: Path) -> Path:
    """Write `folder/report.html`; pictures lie in `folder/report_files/`. summary: as in summary.json."""
    parts = [
        "<h1>OpenSeedVR: one run of the whole system</h1>",
        about(summary),
        html_page.section("Stages", stage_table(summary["stages"])),
        html_page.section("Scores and thresholds", _scores(pictures.scores)),
        html_page.section("Pairs: truth and degraded", _pairs(pictures.pairs)),
        html_page.section("Training", _plots(pictures.losses) + training_tables(summary["training"])),
        html_page.section("Restored clips", _comparisons(pictures.comparisons)),
        html_page.section("Metrics", metric_table(summary["metrics"])),
        html_page.section("Time and memory", totals(summary)),
    ]
    page = html_page.document("OpenSeedVR: a run's report", "\n".join(parts), _STYLE, _SCRIPT)
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def about(summary: dict[str, Any]) -> str:
    """What a reader may and may not conclude."""
    length = "the short form of the demo (fewer clips and steps)" if summary["short"] else "the demo"
    return (
        f'<div class="about"><p>This is {length}: every stage of the system ran once, in order, on real '
        "clips: raw files were cut into clips, scored, filtered and deduplicated; an autoencoder and a "
        "restoration transformer were trained; held-out clips were degraded, restored and measured.</p>"
        "<p><b>It shows</b> that the stages fit together, how both trainings changed the loss on clips they "
        "never saw, and what each stage costs in time and memory on this machine.</p>"
        "<p><b>It does not show</b> the picture quality that the method reaches. Both models are tiny. "
        "Autoencoder and transformer go on from small weights that took about an hour each on two CPU cores, "
        "on a few dozen clips. One step takes noise and compression away, it does not bring detail back; the "
        "text encoders are random and tiny, so prompts carry no meaning here. The autoencoder's own "
        "reconstruction of the truth, shown beside each result, is the ceiling of what this transformer could reach.</p></div>"
    )


def stage_table(stages: list[dict[str, Any]]) -> str:
    head = ["stage", "rows in", "kept", "rejected", "errors", "seconds", "start-up s", "peak memory GiB"]
    rows = []
    for row in stages:
        reasons = [f"{html.escape(str(why))}: {count}" for why, count in (row.get("rejected") or {}).items()]
        rows.append(
            [
                html.escape(str(row["stage"])),
                html_page.number(row.get("rows_in"), 0),
                html_page.number(row.get("rows_kept"), 0),
                "<br>".join(reasons) or "–",
                html_page.number(row.get("errors"), 0),
                html_page.number(row.get("seconds")),
                html_page.number(row.get("startup_s")),
                html_page.number((row.get("peak_memory_bytes") or 0) / GIB, 2),
            ]
        )
    note = (
        "<p class='note'>Rows are files, clips, samples or results, whatever the stage takes. Start-up is the "
        "time of the submission that is not the stage's own: starting the job's processes and imports. "
        "An error row is a file that could not be read; it never ends a stage.</p>"
    )
    return html_page.table(head, rows, frozenset({0, 3})) + note


def training_tables(training: dict[str, Any]) -> str:
    """Held-out losses before and after every stage of both trainings."""
    rows = []
    for model in ("vae", "dit"):
        found = training.get(model) or {}
        for entry in found.get("held_out", []):
            before, after = entry.get("before"), entry.get("after")
            both = isinstance(before, int | float) and isinstance(after, int | float) and before
            change = f"{100 * (after - before) / before:+.1f} %" if both else "–"
            rows.append(
                [
                    "autoencoder" if model == "vae" else "transformer",
                    html.escape(str(entry.get("stage"))),
                    html_page.number(before, 4),
                    html_page.number(after, 4),
                    change,
                    html_page.number(entry.get("triples", entry.get("crops")), 0),
                    f"<code>{html.escape(str(entry.get('set_hash', '–')))}</code>",
                ]
            )
    if not rows:
        return "<p>No training left a history.</p>"
    steps = ", ".join(
        f"{name}: {html_page.number((training.get(key) or {}).get('steps', 0), 0)} steps"
        for key, name in (("vae", "autoencoder"), ("dit", "transformer"))
    )
    head = ["model", "stage", "before", "after", "change", "held-out samples", "of the set"]
    note = (
        "<p class='note'>Loss on clips that are never trained on, the same set before and after (the hash "
        "names it); measured with the moving average of the weights. Lower is better. Losses of the two "
        f"models cannot be compared. {steps}.</p>"
    )
    return (
        html_page.table(head, rows, frozenset({0, 1, 6}))
        + note
        + training_efficiency(training.get("dit") or {})
    )


def training_efficiency(means: dict[str, Any]) -> str:
    """What the transformer's steps lost, as a sentence."""
    texts = {
        "imbalance": "work of the busiest worker above the mean (counted)",
        "wait_share": "share of a step spent waiting for data",
        "utilisation": "counted operations over the workers' measured peak",
    }
    known = [f"{text}: {100 * means[key]:.1f} %" for key, text in texts.items() if key in means]
    return f"<p class='note'>Transformer, means over all steps. {'; '.join(known)}.</p>" if known else ""


def metric_table(metrics: list[dict[str, Any]]) -> str:
    """Means of every method; a metric that is missing is a dash."""
    if not metrics:
        return "<p>Nothing was measured.</p>"
    measured = {key for row in metrics for key, value in row.items() if isinstance(value, dict)}
    names = in_order(measured)
    none = {"mean": None, "standard_error": None}
    rows = [
        [
            html.escape(str(row["method"])),
            html_page.number(row.get("clips"), 0),
            html_page.number(row.get("errors"), 0),
            *[comparison_tables.mean_text(row.get(name) or none, name) for name in names],
        ]
        for row in metrics
    ]
    head = ["method", "clips", "errors", *[html.escape(METRICS[name].heading) for name in names]]
    note = (
        "<p class='note'>Mean over clips ± standard error; arrows say which way is better. LQ is the input "
        f"itself, {CEILING} the ceiling. How the numbers were made stands in evaluation/evaluation.html."
        "</p>"
    )
    return html_page.table(head, rows) + note


def totals(summary: dict[str, Any]) -> str:
    total, machine = summary["total"], summary["machine"]
    rows = [
        ["whole run", f"{html_page.number(total['seconds'] / 60)} minutes"],
        [
            "of this in stages",
            f"{html_page.number(sum(row.get('seconds') or 0 for row in summary['stages']) / 60)} minutes",
        ],
        ["peak memory, all processes", f"{html_page.number(total['peak_memory_bytes'] / GIB, 2)} GiB"],
        ["machine", f"{machine['cpus']} CPU cores, {html.escape(str(machine['platform']))}"],
    ]
    return html_page.table(["what", "how much"], rows) + (
        "<p class='note'>Memory is the sum of proportional set sizes (shared pages divided among those that "
        "map them), sampled every two seconds.</p>"
    )


def image(file: str, alt: str, css_class: str = "") -> str:
    kind = f' class="{css_class}"' if css_class else ""
    return f'<img src="{FILES}/{quote(file)}" alt="{html.escape(alt)}"{kind}>'


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    return f"<figure>{image(picture.file, picture.caption)}<figcaption>{caption}</figcaption></figure>"


def _plots(pictures: list[Picture]) -> str:
    return f'<div class="plots">{"".join(map(_figure, pictures))}</div>' if pictures else ""


def _scores(pictures: list[Picture]) -> str:
    if not pictures:
        return "<p>No scores were written.</p>"
    note = "<p>Every scored clip; red lines are thresholds, clips beyond them are rejected.</p>"
    return note + _plots(pictures)


def _pairs(pictures: list[Picture]) -> str:
    if not pictures:
        return "<p>No pairs were made.</p>"
    note = "<p>The middle frame of each held-out clip (HQ, left) and of what the degradations made of it (LQ).</p>"
    return note + "".join(map(_figure, pictures))


def _comparisons(comparisons: list[Comparison]) -> str:
    if not comparisons:
        return "<p>No clip was restored.</p>"
    return "".join(map(comparison, comparisons))


def comparison(clip: Comparison) -> str:
    """The versions side by side, and below them one picture with two handles."""
    name = html.escape(clip.name)
    side = "".join(_figure(Picture(file, f"{version}")) for version, file in clip.pictures.items())
    parts = [
        f"<h3>{name}</h3>",
        f"<p class='note'>{html.escape(clip.note)}</p>",
        f'<div class="row">{side}</div>',
    ]
    if all(version in clip.pictures for version in SLIDER_VERSIONS):
        low, restored, truth = (clip.pictures[version] for version in SLIDER_VERSIONS)
        # Painted in this order, later over earlier: truth below all, LQ on top, cut at the first handle.
        parts.append(
            '<div class="compare"><div class="slider">'
            + image(truth, f"{clip.name}: truth")
            + "".join(
                image(file, f"{clip.name}: {version}", f"over {css_class}")
                for file, version, css_class in ((restored, "restored", "restored"), (low, "LQ", "low"))
            )
            + "</div>"
            + f'<input class="handle" type="range" min="0" max="100" value="33" aria-label="LQ ends, {name}">'
            + f'<input class="handle" type="range" min="0" max="100" value="67" aria-label="truth begins, {name}">'
            + '<div class="legend"><span>LQ</span><span>restored</span><span>truth</span></div></div>'
        )
    return f"<article>{''.join(parts)}</article>"
