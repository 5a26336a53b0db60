# SPDX-License-Identifier: Apache-2.0
"""The report's figures as SVG texts: matplotlib draws, the page embeds.

Text stays text (`svg.fonttype: none`), so that a browser's search and a test find it. Every figure
has a title and named axes with units; a value that was not measured leaves a gap, never a zero.
"""

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shared.io.files import printable

P = ParamSpec("P")
Row = Mapping[str, Any]
Series = Mapping[str, Mapping[str, Any]]  # a name in the legend -> an engine's figures

INK, QUIET = "#24313d", "#7d8893"
COLOURS = ("#2b6c8f", "#d08a3e", "#6a9a58", "#8d6aa8", "#b5544d", "#5f6f7c")
STYLE = Path(__file__).with_name("report.mplstyle")
SIZE_INCHES = (5.6, 3.6)


def _as_svg(draw: Callable[Concatenate[Axes, P], None]) -> Callable[P, str]:
    """The function that returns as SVG what `draw` draws."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with style.context(STYLE):
            figure = Figure(figsize=SIZE_INCHES, layout="constrained")
            draw(figure.subplots(), *args, **kwargs)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
        svg = text.getvalue()
        return svg[svg.index("<svg") :]  # an inline picture has no XML head

    return drawn


@_as_svg
def by_position(axes: Axes, series: Series) -> None:
    """Share of drafts accepted up to each position; points: given that the one before was."""
    width = 0.8 / len(series)
    depth = 0
    for index, (name, entry) in enumerate(series.items()):
        shares, conditional = (entry["acceptance"][key] for key in ("per_position", "conditional"))
        depth = max(depth, len(shares))
        at = [i + 1 + (index - (len(series) - 1) / 2) * width for i in range(len(shares))]
        colour = COLOURS[index % len(COLOURS)]
        bars = axes.bar(at, shares, 0.92 * width, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, color=INK, padding=2)
        axes.plot(
            at[1:],
            [math.nan if share is None else share for share in conditional[1:]],
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgecolor=INK,
            label="given the one before" if index == len(series) - 1 else None,
        )
    axes.set_xticks(range(1, depth + 1))
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.12)
    axes.legend(loc="upper right", ncols=len(series) + 1, bbox_to_anchor=(1, 1.02))
    axes.set(
        title="Acceptance by position",
        xlabel="position in the draft (token)",
        ylabel="share of drafts (0 to 1)",
    )


@_as_svg
def by_category(axes: Axes, series: Series) -> None:
    """Acceptance length of each category with its 95 % interval."""
    categories = list(
        dict.fromkeys(name for entry in series.values() for name in entry["categories"])
    )
    height = max(SIZE_INCHES[1], 1.4 + 0.3 * len(categories) * len(series))
    if figure := axes.get_figure(root=True):
        figure.set_size_inches(SIZE_INCHES[0], height)
    width = 0.76 / len(series)
    longest = 1.0
    for index, (name, entry) in enumerate(series.items()):
        for row, category in enumerate(categories):
            known = entry["categories"].get(category, {}).get("acceptance")
            if not known:
                continue
            length, bounds = known["acceptance_length"], known["acceptance_length_interval"]
            low, high = bounds or (length, length)
            longest = max(longest, high)
            y = row + (index - (len(series) - 1) / 2) * width
            axes.barh(
                y,
                length,
                0.9 * width,
                color=COLOURS[index % len(COLOURS)],
                label=name if row == 0 else None,
                xerr=[[max(length - low, 0)], [max(high - length, 0)]] if bounds else None,
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            )
            axes.text(0.06, y, f"{length:.2f}", va="center", fontsize=8, color="white")
    axes.axvline(1.0, color=QUIET, linestyle="--", linewidth=1)  # without a drafter
    axes.set_yticks(range(len(categories)), [printable(category) for category in categories])
    axes.set_ylim(-0.6, max(len(categories), 4) - 0.4)  # few categories are not drawn fat
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.05 * longest)
    if len(series) > 1:
        axes.legend(loc="lower right")
    axes.set(
        title="Acceptance length by category",
        xlabel="acceptance length (tokens per drafted step)",
        ylabel="category",
    )


def _lines(axes: Axes, lines: Mapping[str, list[tuple[float, float, Any]]]) -> None:
    """One line for each name through (x, y, interval or None)."""
    for index, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[0])
        x, y = [point[0] for point in points], [point[1] for point in points]
        colour = (
            QUIET if name == "baseline" else COLOURS[(index - ("baseline" in lines)) % len(COLOURS)]
        )
        axes.plot(x, y, marker="o", color=colour, label=name, linewidth=1.8)
        for at, value, bounds in points:
            if bounds:
                axes.vlines(at, bounds[0], bounds[1], color=colour, linewidth=1)
            axes.annotate(
                f"{value:.3g}" if value < 1000 else f"{value:.0f}",
                (at, value),
                textcoords="offset points",
                xytext=(6, -12 if name == "baseline" else 5),  # what is near it stays readable
                fontsize=8,
                color=INK,
            )
    axes.margins(x=0.15, y=0.2)
    axes.legend(loc="best")


def _grouped(rows: Iterable[Row], x: str, y: str, bounds: str | None = None) -> dict[str, Any]:
    lines: dict[str, list[tuple[float, float, Any]]] = {}
    for row in rows:
        if row[y] is not None:
            interval = row[bounds] if bounds else None
            lines.setdefault(row["line"], []).append((row[x], row[y], interval))
    return lines


@_as_svg
def over_concurrency(axes: Axes, rows: Iterable[Row]) -> None:
    """Output tokens/s over the requests in flight, a line for each drafter and K."""
    lines = _grouped(rows, "concurrency", "tokens_per_s")
    _lines(axes, lines)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if len(ticks) > 2:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(
        title="Throughput over concurrency",
        xlabel="concurrency (requests in flight)",
        ylabel="output (tokens per second)",
    )


@_as_svg
def over_depth(axes: Axes, rows: Iterable[Row]) -> None:
    """Speed-up over the draft length, a line for each concurrency."""
    rows = [{**row, "line": f"{row['concurrency']} in flight"} for row in rows]
    lines = _grouped(rows, "num_speculative_tokens", "speedup", "speedup_interval")
    _lines(axes, lines)
    axes.axhline(1.0, color=QUIET, linestyle="--", linewidth=1)
    axes.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
    axes.set(
        title="Speed-up over draft length",
        xlabel="draft length K (tokens)",
        ylabel="speed-up (times the baseline)",
    )


@_as_svg
def over_steps(axes: Axes, points: Sequence[Sequence[float]], title: str, y: str) -> None:
    """A value of the training over its steps; points are (step, value)."""
    steps, values = [point[0] for point in points], [point[1] for point in points]
    marker = "o" if len(points) < 30 else ""
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.8, marker=marker, markersize=4)
    axes.annotate(
        f"{values[-1]:.3g}",
        (steps[-1], values[-1]),
        textcoords="offset points",
        xytext=(4, 5),
        fontsize=8,
    )
    axes.margins(x=0.08, y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="step of the training", ylabel=y)
