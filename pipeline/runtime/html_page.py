"""Static pages that jobs write with their results: one shell, one style, tables and sections.

A page needs no server; whatever it shows besides text is a file next to it.
"""

import html
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;margin:2rem auto;max-width:72rem;
padding:0 1rem}
h1,h2,h3{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ddd;padding-bottom:.3rem}
table{border-collapse:collapse;margin:1rem 0;font-size:.92em}
td,th{padding:.35em .8em;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
td:first-child,th:first-child,td.text,th.text{text-align:left}
.scroll{overflow-x:auto}.note{color:#555}figure{margin:0}
figcaption{font-size:.88em;color:#555;text-align:center}img{max-width:100%;height:auto}
"""


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page; `body` and `style` (in addition to STYLE) are markup, `title` is plain text."""
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>{body}{code}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and the markup below it; the title is plain text."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def table(head: list[str], rows: list[list[str]], text_columns: frozenset[int] = frozenset({0})) -> str:
    """A table of cells that are markup already; text columns are aligned to the left."""

    def cell(tag: str, column: int, content: str) -> str:
        kind = ' class="text"' if column in text_columns else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, title) for i, title in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def number(value: Any, decimals: int = 1) -> str:
    """Format a number with thousands separators; anything else becomes a dash."""
    return f"{value:,.{decimals}f}" if isinstance(value, int | float) else "–"
