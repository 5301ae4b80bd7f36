"""Line charts for pages, as SVG without addresses that takes on the page's ink."""

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

__all__ = ["lines"]

_INK = "#010203"
_COLOURS = ("#0085d1", "#e08a00", "#00a37a", "#c9699f", "#d55e00", "#7d7d7d")
_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_SHAPES = "osD^vPX"
_BESIDE = 4
_STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "scacam",
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def lines(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    x_label: str,
    y_label: str,
    alt: str,
    percent: bool = False,
    y_range: tuple[float, float] | None = None,
    points: bool = False,
) -> Markup:
    """Draw curves into one chart.

    Args:
        series: for each name its x and y values. Curves differ in colour and in their dashes.
        x_label, y_label: what the axes mean.
        alt: what the chart shows, for those who cannot see it.
        percent: whether both axes are shares, to be written as percentages.
        y_range: lowest and highest y to be shown; values beyond it are left out.
        points: whether to draw points and no lines between them.

    Returns:
        An `svg` element.
    """
    with mpl.rc_context(_STYLE):
        below = len(series) > _BESIDE
        figure = Figure(figsize=(7.2, 4.6 if below else 3.6), layout="constrained")
        axes = figure.add_subplot()
        low, high = y_range or (-np.inf, np.inf)
        for index, (name, (x, y)) in enumerate(series.items()):
            y = np.where((y >= low) & (y <= high), y, np.nan)
            colour = _COLOURS[index % len(_COLOURS)]
            if points:
                shape = _SHAPES[index % len(_SHAPES)]
                axes.scatter(
                    x, y, 60, marker=shape, color=colour, label=name, clip_on=False, zorder=3
                )
                continue
            axes.plot(
                x,
                y,
                label=name,
                color=colour,
                linestyle=_DASHES[(index + index // 12) % len(_DASHES)],  # 24 pairs with colours
                linewidth=1.8,
                clip_on=False,
            )
        axes.set(xlabel=x_label, ylabel=y_label, ylim=y_range)
        axes.margins(x=0.05 if points else 0)
        axes.tick_params(bottom=False, left=False)
        axes.grid(axis="y", color="#80808040", linewidth=0.8, clip_on=False)
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if below:
            figure.legend(loc="outside lower left", ncols=2, frameon=False)
        else:
            figure.legend(loc="outside right upper", frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    return _inline(buffer.getvalue(), alt)


def _inline(document: str, alt: str) -> Markup:
    """From an SVG document to an element of a page: no declarations, no ids, the page's colour."""
    svg = document[document.index("<svg") :]
    shapes = dict(re.findall(r'<path id="([^"]*)" ([^>]*)/>', svg))
    svg = re.sub(
        r'<use xlink:href="#([^"]*)" x="([^"]*)" y="([^"]*)" style="([^"]*)"/>',
        lambda use: (
            f'<g transform="translate({use[2]} {use[3]})" style="{use[4]}">'
            f"<path {shapes[use[1]]}/></g>"
        ),
        svg,
    )
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|id|clip-path)="[^"]*"', "", svg)
    svg = svg.replace(_INK, "currentColor")
    return Markup(f'<svg role="img" aria-label="{Markup.escape(alt)}"' + svg.removeprefix("<svg"))
