"""The page selection/scores.html: the distribution of each score, and what its threshold cuts.

It is a single page without scripts or further files. Scores are read one file at a time; a bounded sample of
each is kept for its histogram and quantiles, while what a threshold cuts is counted exactly.
"""

import dataclasses
import html
from collections.abc import Mapping

import numpy as np

from pipeline.data.selection import Threshold
from pipeline.runtime import html_page

_SAMPLE = 20_000  # values kept of one score
_BINS, _WIDTH_PX, _HEIGHT_PX = 48, 480, 120
_BLUE, _RED = "#4a76a8", "#c0392b"
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclasses.dataclass
class Spread:
    """One score over all clips that have it."""

    meaning: str
    threshold: Threshold
    clips: int = 0
    below: int = 0
    """Clips cut by the threshold's min, regardless of other thresholds."""
    above: int = 0
    sample: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """Every n-th value; n doubles whenever there are too many."""
    _step: int = 1

    def add(self, values: np.ndarray) -> None:
        """More clips' values; those that are not finite do not count."""
        values = values[np.isfinite(values)]
        if self.threshold.min is not None:
            self.below += int((values < self.threshold.min).sum())
        if self.threshold.max is not None:
            self.above += int((values > self.threshold.max).sum())
        offset = -self.clips % self._step
        self.clips += len(values)
        self.sample = np.concatenate([self.sample, values[offset :: self._step]])
        while len(self.sample) > _SAMPLE:
            self.sample, self._step = self.sample[::2], 2 * self._step


def page(spreads: Mapping[str, Spread], rejected: Mapping[str, int], clips: int, kept: int) -> str:
    """The page as HTML. rejected: clips by reason, the first that applies."""
    shown = {name: spread for name, spread in spreads.items() if spread.clips}
    reasons = [[html.escape(why), html_page.number(count, 0)] for why, count in rejected.items()]
    body = [
        "<h1>Scores and thresholds</h1>",
        f"<p>{clips:,} clips, {kept:,} kept. Red lines are thresholds; a clip beyond one is rejected.</p>",
        html_page.section("Why clips are rejected", html_page.table(["first reason", "clips"], reasons)),
        html_page.section("What each threshold cuts, were it the only one", _cuts(shown)),
        *[html_page.section(name, _one(spread)) for name, spread in shown.items()],
    ]
    return html_page.document("Scores and thresholds", "".join(body))


def _cuts(spreads: Mapping[str, Spread]) -> str:
    rows = []
    for name, spread in spreads.items():
        limits = [
            "–" if limit is None else f"{limit:g} cuts {count:,} ({count / spread.clips:.1%})"
            for limit, count in ((spread.threshold.min, spread.below), (spread.threshold.max, spread.above))
        ]
        rows.append([html.escape(name), html_page.number(spread.clips, 0), *limits])
    return html_page.table(["score", "clips", "min", "max"], rows)


def _one(spread: Spread) -> str:
    values = np.quantile(spread.sample, _QUANTILES)
    head = [f"{quantile:.0%} below" for quantile in _QUANTILES]
    return f"<p class='note'>{html.escape(spread.meaning)}</p>{_histogram(spread)}" + html_page.table(
        head, [[f"{value:.4g}" for value in values]], frozenset()
    )


def _histogram(spread: Spread) -> str:
    """An SVG over the range of all but the outermost values, which the first and the last bar hold."""
    low, high = (float(value) for value in np.quantile(spread.sample, (0.002, 0.998)))
    limits = [limit for limit in (spread.threshold.min, spread.threshold.max) if limit is not None]
    low, high = min([low, *limits]), max([high, *limits])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(spread.sample.clip(low, high), bins=_BINS, range=(low, high))
    width = _WIDTH_PX / _BINS
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT_PX - height:.1f}" width="{width - 1:.1f}" '
        f'height="{height:.1f}" fill="{_BLUE}"/>'
        for i, height in enumerate((_HEIGHT_PX * counts / counts.max()).tolist())
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT_PX}" stroke="{_RED}" stroke-width="2"/>'
        for x in ((limit - low) / (high - low) * _WIDTH_PX for limit in limits)
    )
    scale = "".join(
        f'<text x="{x}" y="{_HEIGHT_PX + 16}" text-anchor="{anchor}" font-size="12">{value:.4g}</text>'
        for x, anchor, value in ((0, "start", low), (_WIDTH_PX, "end", high))
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH_PX} {_HEIGHT_PX + 20}" width="{_WIDTH_PX}" role="img" '
        f'aria-label="histogram">{bars}{lines}{scale}</svg>'
    )
