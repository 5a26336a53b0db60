# SPDX-License-Identifier: Apache-2.0
"""`report.html` and `compare.html`: one file each, readable without a network.

Every number on the page is looked up in the report by its JSON pointer (RFC 6901), which stays on
the element (`data-path`), so that the page cannot say anything that the report does not.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stages.bench.figures.figures import CONTEXT_NAMES
from stages.bench.report import plots, terminal

Report = Mapping[str, Any]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# What the curve of each train.loss shows.
_LOSSES = {
    "cross_entropy": "soft cross-entropy (nats)",
    "lk": "-log of the chance of acceptance (nats)",
    "tv": "1 - the chance of acceptance (0 to 1)",
    "lk_hybrid": "cross-entropy and 1 - the chance of acceptance, blended",
}
NOT_MEASURED = "–"  # noqa: RUF001 - an en dash is what a table shows for nothing


def pointer(*parts: object) -> str:
    """A JSON pointer: `pointer("head", "categories", "a/b")` is `/head/categories/a~1b`."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _flat(parts: Iterable[Any]) -> Iterator[Any]:
    for part in parts:
        yield from _flat(part) if isinstance(part, tuple) else (part,)


class Numbers:
    """Numbers of one report, as elements that say where they come from."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def value(self, *parts: Any) -> Any:
        """The report's value, or None where it has none; parts may be tuples of parts."""
        found: Any = self._report
        for part in _flat(parts):
            if isinstance(found, list | tuple) and part < len(found):
                found = found[part]
            else:
                found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def __call__(self, *parts: Any, digits: int = 2, scale: float = 1) -> Markup:
        value = self.value(*parts)
        if value is None:
            return Markup('<span class="none">{}</span>').format(NOT_MEASURED)
        return Markup(
            '<span class="num" data-path="{}" data-digits="{}" data-scale="{:g}">{}</span>'
        ).format(pointer(*_flat(parts)), digits, scale, f"{scale * value:.{digits}f}")

    def interval(self, *parts: Any, digits: int = 2) -> Markup:
        """`2.31 to 2.58`, or nothing."""
        if self.value(*parts) is None:
            return Markup("")
        low, high = self(*parts, 0, digits=digits), self(*parts, 1, digits=digits)
        return Markup('<span class="interval">{} to {}</span>').format(low, high)


def render(report: Report) -> str:
    """The page of one report."""
    head = {"head": report["head"]}
    drafters = head | ({"ngram": report["ngram"]} if "ngram" in report else {})
    load = [
        row
        for row in report["sweep"]
        if all(row[axis] == report[axis] for axis in ("temperature", "max_tokens"))
    ]
    figures = [
        (plots.by_position(drafters), "How often a draft is still right at each position."),
        (plots.by_category(head), "On which prompts drafting pays; whiskers: 95 % interval."),
    ]
    # A figure over one value is a point, and the tables have it.
    if _varies(load, "concurrency"):
        figures.append(
            (
                plots.over_concurrency({**row, "line": _line(row)} for row in load),
                "The larger the batch, the less idle compute a draft can use.",
            )
        )
    heads = [row for row in load if row["drafter"] == "head"]
    if "baseline" in report and _varies(heads, "num_speculative_tokens"):
        figures.append(
            (
                plots.over_depth(heads),
                "Whiskers: 95 % interval; under the dashed line drafting costs.",
            )
        )
    figures += _of_training(report.get("lineage") or {})
    return _TEMPLATES.get_template("report.html.j2").render(
        report=report,
        number=Numbers(report),
        figures=[(Markup(svg), caption) for svg, caption in figures],
        load=terminal.describe_load(report),
        is_slower=terminal.is_slower,
        context_names=CONTEXT_NAMES,
        as_json=json.dumps(report, indent=2, ensure_ascii=False),
    )


def _varies(rows: Iterable[Report], axis: str) -> bool:
    return len({row[axis] for row in rows}) > 1


def _of_training(lineage: Report) -> list[tuple[str, str]]:
    """The curves of the training, where the run has them."""
    drawn = []
    if len(lineage.get("loss") or ()) > 1:
        stages = {entry["stage"]: entry for entry in lineage.get("stages", ())}
        # A training that does not name its loss is older than the others.
        loss = stages.get("train", {}).get("settings", {}).get("loss", "cross_entropy")
        svg = plots.over_steps(lineage["loss"], "Training loss", _LOSSES.get(loss, loss))
        drawn.append((svg, "Weighted over TTT steps; it may keep falling after acceptance peaks."))
    if len(lineage.get("walks") or ()) > 1:
        title, unit = "Walked acceptance length", "acceptance length (tokens per drafted step)"
        svg = plots.over_steps(lineage["walks"], title, unit)
        drawn.append((svg, "On held-out answers while training; this head is the best checkpoint."))
    return drawn


def _line(row: Report) -> str:
    depth = row["num_speculative_tokens"]
    return f"{row['drafter']}, K = {depth}" if depth else str(row["drafter"])


def render_comparison(first: Report, second: Report) -> str:
    """The page of two reports side by side."""
    names = [first["run"], second["run"]]
    if names[0] == names[1]:
        names = [f"{names[0]} (first)", f"{names[1]} (second)"]
    series = dict(zip(names, (first["head"], second["head"]), strict=True))
    figures = [
        (plots.by_position(series), "How often a draft is still right at each position."),
        (plots.by_category(series), "On which prompts drafting pays; whiskers: 95 % interval."),
    ]
    return _TEMPLATES.get_template("compare.html.j2").render(
        names=names,
        reports=[first, second],
        loads=[terminal.describe_load(report) for report in (first, second)],
        rows=[
            (name, left, right, terminal.change(left, right))
            for name, left, right in terminal.side_by_side(first, second)
        ],
        figures=[(Markup(svg), caption) for svg, caption in figures],
        none=NOT_MEASURED,
    )
