# SPDX-License-Identifier: Apache-2.0
"""What bench writes and others read: `report.json`, its version and shape; the head's answers in `raw/`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from shared.errors import UserError
from shared.io.records import Shape, read_record, require_shape

SCHEMA_VERSION = 3
_ABSENT: Any = None
_AGAIN = "Measure again with this version of eyrie."

Interval = Annotated[list[float], Field(min_length=2, max_length=2)] | None


class _Acceptance(Shape):
    acceptance_length: float = Field(ge=1)
    acceptance_length_interval: Interval
    acceptance_rate: float
    per_position: list[float]
    conditional: list[float | None]


class _Times(Shape):
    median: float
    p99: float


class _Measured(Shape):
    requests: int
    acceptance: _Acceptance | None = None
    speedup: float | None = None
    speedup_interval: Interval = None
    ttft_s: _Times | None
    tpot_s: _Times | None


class _Engine(_Measured):
    tokens_per_s: float = Field(gt=0)
    tokens_per_step: float | None = None
    categories: dict[str, _Measured]
    contexts: dict[str, _Measured] = Field(default_factory=dict)


class _Head(_Engine):
    acceptance: _Acceptance


class _Load(Shape):
    concurrency: int
    temperature: float
    max_tokens: int


class _Row(_Load):
    drafter: str
    tokens_per_step: float | None
    num_speculative_tokens: int
    acceptance_length: float | None
    tokens_per_s: float
    speedup: float | None
    speedup_interval: Interval
    tpot_s: _Times | None


class _Best(_Load):
    num_speculative_tokens: int
    speedup: float | None = None
    serve: str | None = None


class _Lossless(Shape):
    identical: int
    compared: int
    ties: int
    wrong: int


class _Report(_Load):
    """The keys that readers use."""

    run: str
    target: str
    vllm_version: str
    num_speculative_tokens: int
    head: _Head
    baseline: _Engine = Field(
        default_factory=lambda: _ABSENT
    )  # not measured: no such key, never a null
    ngram: _Engine = Field(default_factory=lambda: _ABSENT)
    sweep: list[_Row]
    best: list[_Best]
    lossless: _Lossless | None
    warnings: list[str]
    measured: dict[str, Any]
    provenance: dict[str, Any]


class _Counts(Shape):
    num_drafts: int = Field(ge=0)
    num_accepted_tokens: int = Field(ge=0)


class _Answer(Shape):
    """The keys from which intervals are computed."""

    id: str
    token_ids: list[int] = Field(min_length=1)
    latency_s: float = Field(gt=0)
    counters: _Counts | None


class _Segment(Shape):
    requests: list[_Answer]


class _Measurement(Shape):
    segments: list[_Segment]


class _Raw(Shape):
    loads: list[_Measurement] = Field(min_length=1)


def read_report(path: Path) -> dict[str, Any]:
    """A finished report of this schema.

    Raises:
        UserError: none, or one of another version.
    """
    report = read_record(path, Shape, remedy=_AGAIN)
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected a bench report of schema version {SCHEMA_VERSION}, found {version!r}.",
            code="report-schema",
            remedy=_AGAIN,
            facts={"path": str(path), "expected": SCHEMA_VERSION, "found": version},
        )
    return require_shape(report, _Report, where=str(path), remedy=_AGAIN)


def read_answers(bench: Path) -> list[dict[str, Any]]:
    """The head's answers at the first load and the first K, which `report.json` has the figures of.

    Args:
        bench: the folder of a finished bench.

    Raises:
        UserError: they are not there, or are something else.
    """
    raw = read_record(bench / "raw" / "head.json", _Raw, remedy=_AGAIN)
    return [answer for segment in raw["loads"][0]["segments"] for answer in segment["requests"]]


def require_comparable(
    earlier: Mapping[str, Any], settings: Mapping[str, Any], prompts: str | None, path: Path
) -> None:
    """Refuse an earlier report of something else, before anything is measured.

    Args:
        settings: of the section bench, as JSON has them; the first value of each list is compared.
        prompts: their digest; None where it is not known.
        path: of the report.

    Raises:
        UserError: with the settings that differ.
    """
    swept = ("num_speculative_tokens", "concurrency", "temperature", "max_tokens")
    ours = {
        **{name: settings[name][0] for name in swept},
        "target": settings["run"]["target"],
        "mode": "endpoint" if settings["endpoint"] else "served",
        "max_prompts": settings["max_prompts"],
    }
    theirs = {name: earlier.get(name) for name in ours}
    if prompts is not None:
        ours["prompts"], theirs["prompts"] = prompts, earlier["measured"].get("prompts")
    found = [
        f"{name}: {theirs[name]} then, {ours[name]} now"
        for name in ours
        if theirs[name] != ours[name]
    ]
    if found:
        raise UserError(
            f"bench.earlier_report: {path} measured something else ({'; '.join(found)}).",
            code="report-not-comparable",
            remedy="Give a report of the same load and prompts, or leave bench.earlier_report out.",
            facts={"path": str(path), "differences": found},
        )
