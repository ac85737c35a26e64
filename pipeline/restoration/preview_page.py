"""The page preview.html: a frame of each restored file before and after, with a slider."""

import html
import os
from typing import Any

from pipeline.runtime import html_page
from pipeline.store import hashing, storage

FOLDER = "_preview"
PAGE = "preview.html"

_STYLE = """
body{max-width:980px}
figure{margin:0 0 2.5em}
.pair{position:relative;line-height:0}
.pair img{width:100%;display:block}
.pair .over{position:absolute;inset:0;clip-path:inset(0 0 0 var(--at,50%))}
.pair .bar{position:absolute;top:0;bottom:0;left:var(--at,50%);width:2px;background:#fff}
input{width:100%;margin:.4em 0 0}
"""


def write(output_url: str, rows: list[dict[str, Any]]) -> None:
    """The page of all manifest rows that have a preview."""
    figures = []
    for row in rows:
        name = hashing.stable_id(row["name"])
        there = storage.exists(storage.join(output_url, FOLDER, f"{name}_restored.jpg"))
        if row["error"] is None and row.get("preview") and there:
            figures.append(_figure(row, f"{FOLDER}/{name}"))
    body = (
        "<h1>Before and after</h1><p>Left of the line the input, right of it the restored frame.</p>"
        + "".join(figures)
    )
    page = html_page.document("Before and after", body, _STYLE)
    storage.write_bytes(storage.join(output_url, PAGE), page.encode())


def _figure(row: dict[str, Any], prefix: str) -> str:
    name = html.escape(row["name"])
    size_in, size_out = (f"{row[key][1]}x{row[key][0]}" for key in ("input_size", "output_size"))
    output = html.escape(os.path.relpath(row["output"], os.path.dirname(row["output"])))
    return (
        f'<figure><div class="pair"><img src="{prefix}_lq.jpg" alt="input of {name}">'
        f'<img class="over" src="{prefix}_restored.jpg" alt="{name}, restored"><div class="bar"></div></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{name}: share that shows the input" '
        "oninput=\"this.previousElementSibling.style.setProperty('--at', this.value + '%')\">"
        f"<figcaption>{name}: {size_in} to {size_out}, {row['frames']} frames, {output}</figcaption></figure>"
    )
