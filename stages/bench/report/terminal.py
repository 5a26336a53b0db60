# SPDX-License-Identifier: Apache-2.0
"""A report's tables in the terminal, and two reports side by side."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.runtime import tables
from shared.runtime.tables import cell

WIDTH = 110

logger = logging.getLogger(__name__)

Report = Mapping[str, Any]


def interval(bounds: list[float] | None) -> str:
    """` [2.31, 2.58]`, or nothing."""
    return f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""


def milliseconds(quantiles: Mapping[str, float] | None) -> str:
    """`median / p99` in milliseconds."""
    if quantiles is None:
        return ""
    return f"{1000 * quantiles['median']:.1f} / {1000 * quantiles['p99']:.1f}"


def describe_load(entry: Report) -> str:
    """A load in words."""
    return (
        f"concurrency {entry['concurrency']}, temperature {entry['temperature']:g}, "
        f"max_tokens {entry['max_tokens']}"
    )


def show(found: Report) -> None:
    """Log the report."""
    shown = [_engines(found), _groups(found, "category", "categories")]
    if len(found["head"].get("contexts", {})) > 1:
        shown.append(_groups(found, "prompt tokens", "contexts"))
    if len(found["sweep"]) > sum(name in found for name in ("baseline", "head", "ngram")):
        shown.append(_sweep(found))
    for table in shown:
        tables.log(logger, table, width=WIDTH)
    for sentence in sentences(found):
        logger.info("%s", sentence)


def sentences(found: Report) -> Iterator[str]:
    """What the tables do not show."""
    if lossless := found["lossless"]:
        yield (
            f"greedy answers: {lossless['identical']} of {lossless['compared']} identical to the "
            f"baseline's, {lossless['ties']} differ at a tie, {lossless['wrong']} are wrong"
        )
    for best in found["best"]:
        with_k = f"K = {best['num_speculative_tokens']}"
        if is_slower(best):
            with_k = "without the head, which costs more than it saves"
        # An endpoint is served already, with the one K that it has.
        if best.get("serve"):
            yield f"to serve at {describe_load(best)}, {with_k}: {best['serve']}"
        elif is_slower(best):
            yield f"to serve at {describe_load(best)}: {with_k}"
    yield from found["warnings"]
    if limit := found.get("limit"):
        yield f"{limit['says']} Next: {limit['next']}"


def is_slower(best: Report) -> bool:
    """Whether decoding without the head was faster than with the best K of this load."""
    return best.get("speedup") is not None and best["speedup"] < 1


def _table(title: str, columns: Sequence[str]) -> Table:
    """An empty table; the first of the columns holds names."""
    table = Table(title=cell(title))
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="right" if index else "left")
    return table


def _engines(found: Report) -> Table:
    title = f"{found['run']}: K = {found['num_speculative_tokens']}, {describe_load(found)}"
    columns = "engine, tokens/step, acceptance length, rate, by position, tokens/s, speed-up"
    table = _table(title, columns.split(", "))
    for name in ("baseline", "ngram", "head"):
        if name not in found:
            continue
        entry = found[name]
        cells = ["1.00", "1.00", "", ""]
        if known := entry.get("acceptance"):
            bounds = interval(known["acceptance_length_interval"])
            # ngram's leaves out the steps in which it drafts nothing: it compares with nothing here.
            length = f"{known['acceptance_length']:.2f}{bounds}" if name == "head" else ""
            positions = " ".join(f"{share:.2f}" for share in known["per_position"])
            steps = _number(entry.get("tokens_per_step"), ".2f")
            cells = [steps, length, f"{known['acceptance_rate']:.2f}", positions]
        table.add_row(name, *cells, f"{entry['tokens_per_s']:.1f}", _speedup(entry))
    return table


def _speedup(entry: Report) -> str:
    if entry.get("speedup") is None:
        return ""
    return f"{entry['speedup']:.2f}{interval(entry.get('speedup_interval'))}"


def _groups(found: Report, title: str, groups: str) -> Table:
    columns = f"{title}, requests, acceptance length, speed-up, TTFT ms, TPOT ms"
    table = _table(f"the head by {title}", columns.split(", "))
    for name, entry in found["head"][groups].items():
        known = entry.get("acceptance")
        bounds = interval(known["acceptance_length_interval"]) if known else ""
        length = f"{known['acceptance_length']:.2f}{bounds}" if known else ""
        times = (milliseconds(entry["ttft_s"]), milliseconds(entry["tpot_s"]))
        table.add_row(cell(name), str(entry["requests"]), length, _speedup(entry), *times)
    return table


def _sweep(found: Report) -> Table:
    columns = "drafter, K, concurrency, temp., max_tokens, tokens/step, tokens/s, speed-up, TPOT ms"
    table = _table("every load", columns.split(", "))
    for row in found["sweep"]:
        table.add_row(
            cell(row["drafter"]),
            str(row["num_speculative_tokens"] or ""),
            str(row["concurrency"]),
            f"{row['temperature']:g}",
            str(row["max_tokens"]),
            _number(row["tokens_per_step"], ".2f"),
            f"{row['tokens_per_s']:.1f}",
            _speedup(row),
            milliseconds(row["tpot_s"]),
        )
    return table


def side_by_side(first: Report, second: Report) -> Iterator[tuple[str, float | None, float | None]]:
    """(figure, first's, second's) of everything that two reports have in common."""

    def figures(report: Report) -> Iterator[tuple[str, float | None]]:
        head = report["head"]
        yield "acceptance length", head["acceptance"]["acceptance_length"]
        yield "acceptance rate", head["acceptance"]["acceptance_rate"]
        for position, share in enumerate(head["acceptance"]["per_position"], start=1):
            yield f"accepted at position {position}", share
        yield "tokens per step", head.get("tokens_per_step")
        yield "tokens/s", head["tokens_per_s"]
        yield "speed-up", head.get("speedup")
        for name in ("ttft_s", "tpot_s"):
            for which, value in (head[name] or {}).items():
                yield f"{name.removesuffix('_s').upper()} {which} (s)", value
        for category, entry in head["categories"].items():
            if known := entry.get("acceptance"):
                yield f"acceptance length, {category}", known["acceptance_length"]

    left, right = dict(figures(first)), dict(figures(second))
    for name in left | right:
        yield name, left.get(name), right.get(name)


def compare(first: Report, second: Report) -> None:
    """Print two reports side by side."""
    runs = (first["run"], second["run"])
    table = _table(" and ".join(runs), ("figure", *runs, "change"))
    for name, left, right in side_by_side(first, second):
        table.add_row(cell(name), _number(left), _number(right), change(left, right))
    Console(width=WIDTH).print(table)


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else f"{value:{form}}"


def change(left: float | None, right: float | None) -> str:
    """`+4.2 %`, or nothing where one is missing."""
    return f"{100 * (right / left - 1):+.1f} %" if left and right is not None else ""
