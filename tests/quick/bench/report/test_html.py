# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: what it shows, and that it says what the report says."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from shared.io import files
from shared.settings import build
from stages.bench import run
from stages.bench.config import BenchConfig, CompareConfig
from stages.bench.report import gates, html, report
from stages.train.config import TrainConfig
from tests.measurements import (
    baseline_requests,
    engine,
    head_requests,
    lossless,
    request,
    under_load,
)
from tests.quick.bench.report import reports

CHROMIUM = shutil.which("chromium")
IN_CI = bool(os.environ.get("CI") or os.environ.get("EYRIE_CI"))
OFFLINE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Continuous integration must have a browser; elsewhere its absence is no fault of ours.
needs_browser = pytest.mark.skipif(CHROMIUM is None and not IN_CI, reason="no chromium here")

LINEAGE: dict[str, Any] = {
    "stages": [
        {
            "stage": "train",
            "rows": 40,
            "left_out": 2,
            "reasons": {"too_long": 2},
            "bytes": 1_234_567,
            "seconds": 61.5,
            "facts": {
                "tokens": 889630,
                "steps": 30,
                "best_step": 30,
                "walked_acceptance_length": 2.75,
                "final_loss": 0.125,
            },
            "finished": "2026-01-02T03:04:05+00:00",
            "settings": {"run.seed": 0, "learning_rate": 0.0001, "optimizer": "<adamw>"},
            "fingerprint": "f" * 64,
            "made_by": "torch 2.13.0 in eyrie/train:0.1.0",
            "accelerator": "cpu",
            "revision": "abc",
        }
    ],
    "seconds": 61.5,
    "loss": [[10, 3.0], [20, 2.0], [30, 0.125]],
    "walks": [[15, 1.5], [30, 2.75]],
}


def deeper() -> list[dict[str, Any]]:
    """Drafts of K = 5 for the second head of the sweep."""
    return [
        request(f"{category}-{n}", category, [2, 1, 3, 2, 1, 1], tokens=30, latency_s=1.1 + n)
        for category in ("coding", "writing")
        for n in range(2)
    ]


def made(name: str = "demo", *, scale: float = 1.0) -> dict[str, Any]:
    """A report with everything that a page can show: a sweep, ngram, a tie, a wrong answer."""
    flags = {"target": "targets/demo", "name": name, "compare_ngram": "true"}
    flags |= {"num_speculative_tokens": "[3,5]", "concurrency": "[1,8]", "max_wrong_answers": "0"}
    config = build(BenchConfig, flags)

    def loads(rows: list[dict[str, Any]], *seconds: float, depth: int = 3) -> list[dict[str, Any]]:
        pairs = zip((1, 8), seconds, strict=True)
        return [under_load(rows, wall_s=scale * s, concurrency=c, depth=depth) for c, s in pairs]

    divergence = {"engine": "head", "concurrency": 8, "max_tokens": 256, "id": "<b>&", "turn": 0}
    divergence |= {"position": 17, "baseline_token": 5, "head_token": 6}
    parted = [
        {**divergence, "verdict": "tie", "gap": 0.0123},
        {**divergence, "verdict": "wrong", "gap": None},
    ]
    of_baseline = lossless(
        identical=2, ties=1, wrong=1, noise_logits=0.03125, contexts_scored=17, divergences=parted
    )
    results = {
        "head": engine(*loads(head_requests(), 6.0, 2.5)),
        "head-k5": engine(*loads(deeper(), 5.5, 3.1, depth=5)),
        "ngram": engine(*loads(head_requests(scale=1.5), 9.0, 4.0)),
        "ngram-k5": engine(*loads(deeper(), 9.5, 4.4, depth=5)),
        "baseline": engine(*loads(baseline_requests(), 12.0, 4.0), lossless=of_baseline),
    }
    found = report.build(
        config, results, measured={"prompts": "abc"}, warnings=["norm_output is true"]
    )
    found["lineage"], found["seconds"] = LINEAGE, 33.25
    found["limit"] = {"limit": "rows", "says": "The walk <stopped>.", "next": "More prompts."}
    found["gates"] = gates.judge(config, found, None)
    return dict(json.loads(json.dumps(found)))  # as a reader of report.json gets it


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The page in headless Chromium, without a network; a console error fails the test."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "continuous integration must have chromium"
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OFFLINE))
        view = browser.new_page(viewport={"width": 1180, "height": 900})
        view.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        view.on("pageerror", lambda error: said.append(str(error)))
        asked: list[str] = []
        view.on("request", lambda request: asked.append(request.url))
        view.goto(path.as_uri())
        yield view
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def resolve(found: Any, path: str) -> Any:
    """RFC 6901, by hand."""
    for part in path.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@needs_browser
def test_the_page_shows_the_reports_own_numbers(tmp_path: Path) -> None:
    found = made()
    (tmp_path / "report.html").write_text(html.render(found))
    with opened(tmp_path / "report.html") as view:
        shown = view.eval_on_selector_all(
            "[data-path]",
            "all => all.map(e => [e.dataset.path, e.dataset.digits, e.dataset.scale, e.innerText,"
            " e.getClientRects().length])",
        )
        headings = view.locator("h2").all_inner_texts()
        tables = {name: view.locator(f"#{name} tr").count() for name in ("sweep", "divergences")}
        outcomes = view.locator("#gates td:last-child").all_inner_texts()
        text = view.locator("body").inner_text()
        settings = view.locator("details").first.text_content()
        wide = view.evaluate("document.documentElement.scrollWidth")
        cut = view.eval_on_selector_all(
            ".card", "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
        )
    assert "The walk <stopped>. Next. More prompts." in text
    assert len(shown) > 100
    for path, digits, scale, shown_text, visible in shown:
        assert shown_text == f"{resolve(found, path) * float(scale):.{int(digits)}f}", path
        assert visible, path
    paths = {path for path, *_ in shown}
    for needed in (
        "/head/acceptance/acceptance_length",
        "/head/speedup",
        "/baseline/tokens_per_s",
        "/ngram/acceptance/acceptance_rate",
        "/head/categories/coding/ttft_s/p99",
        "/lossless/wrong",
        "/gates/0/value",
        "/lineage/stages/0/seconds",
        "/lineage/stages/0/facts/final_loss",
        "/lineage/stages/0/reasons/too_long",
        "/lineage/seconds",
        "/seconds",
    ):
        assert needed in paths
    assert tables == {"sweep": 11, "divergences": 3}
    assert outcomes == ["met", "missed"]
    assert "Greedy answers against the baseline's" in headings
    assert "norm_output is true" in text
    assert "<b>&" in text  # a prompt's id is text, never markup
    assert found["provenance"]["revision"] in text
    assert "torch 2.13.0 in eyrie/train:0.1.0" in text
    assert "learning_rate0.0001optimizer<adamw>" in "".join(settings.split())
    assert wide <= 1180
    assert cut == []


TITLES = {
    "Acceptance by position": ("position in the draft (token)", "share of drafts (0 to 1)"),
    "Acceptance length by category": ("acceptance length (tokens per drafted step)", "category"),
    "Throughput over concurrency": (
        "concurrency (requests in flight)",
        "output (tokens per second)",
    ),
    "Speed-up over draft length": ("draft length K (tokens)", "speed-up (times the baseline)"),
    "Training loss": ("step of the training", "soft cross-entropy (nats)"),
    "Walked acceptance length": (
        "step of the training",
        "acceptance length (tokens per drafted step)",
    ),
}


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({}, "soft cross-entropy (nats)"),
        ({"loss": "cross_entropy"}, "soft cross-entropy (nats)"),
        ({"loss": "lk"}, "-log of the chance of acceptance (nats)"),
        ({"loss": "tv"}, "1 - the chance of acceptance (0 to 1)"),
        ({"loss": "lk_hybrid"}, "cross-entropy and 1 - the chance of acceptance, blended"),
        ({"loss": "of_tomorrow"}, "of_tomorrow"),
    ],
)
def test_the_curve_is_named_by_the_loss_that_was_trained(
    settings: dict[str, str], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str]] = []

    def over_steps(_: Any, title: str, label: str) -> str:
        drawn.append((title, label))
        return ""

    monkeypatch.setattr(html.plots, "over_steps", over_steps)
    train = {**LINEAGE["stages"][0], "settings": settings}
    html._of_training({**LINEAGE, "stages": [train]})
    assert drawn[0] == ("Training loss", unit)


def test_every_loss_that_train_has_is_named() -> None:
    assert set(html._LOSSES) == set(get_args(TrainConfig.model_fields["loss"].annotation))


@needs_browser
def test_every_figure_has_a_title_axes_with_units_and_its_values(tmp_path: Path) -> None:
    found = made()
    (tmp_path / "report.html").write_text(html.render(found))
    with opened(tmp_path / "report.html") as view:
        figures = view.eval_on_selector_all(
            "figure",
            "all => all.map(f => ({texts: [...f.querySelectorAll('svg text')].map(t => t.textContent),"
            " caption: f.querySelector('figcaption').innerText, width: f.querySelector('svg')"
            ".getBoundingClientRect().width}))",
        )
    by_title = {title: f for title in TITLES for f in figures if title in f["texts"]}
    assert len(figures) == len(by_title) == len(TITLES)
    for title, (x, y) in TITLES.items():
        texts = by_title[title]["texts"]
        assert x in texts
        assert y in texts
        assert by_title[title]["caption"]
        assert by_title[title]["width"] > 300
    acceptance = found["head"]["acceptance"]
    for share in acceptance["per_position"]:
        assert f"{share:.2f}" in by_title["Acceptance by position"]["texts"]
    for entry in found["head"]["categories"].values():
        length = entry["acceptance"]["acceptance_length"]
        assert f"{length:.2f}" in by_title["Acceptance length by category"]["texts"]
    for row in found["sweep"]:
        assert f"{row['tokens_per_s']:.3g}" in by_title["Throughput over concurrency"]["texts"]
        if row["drafter"] == "head":
            assert f"{row['speedup']:.3g}" in by_title["Speed-up over draft length"]["texts"]
    assert "0.125" in by_title["Training loss"]["texts"]
    assert "2.75" in by_title["Walked acceptance length"]["texts"]
    lines = {"baseline", "head, K = 3", "head, K = 5", "ngram, K = 3"}
    assert lines <= set(by_title["Throughput over concurrency"]["texts"])


@needs_browser
def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made("one"), made("two", scale=0.8)
    for found in (first, second):
        files.write_json(tmp_path / found["run"] / "bench" / "report.json", found)
    flags = {"first": "one", "second": "two", "out": str(tmp_path / "compare.html")}
    run.compare(build(CompareConfig, {**flags, "workspace": str(tmp_path)}))
    printed = capsys.readouterr().out
    with opened(tmp_path / "compare.html") as view:
        rows = view.eval_on_selector_all(
            "#numbers tr", "all => all.map(r => [...r.children].map(c => c.innerText))"
        )
        texts = view.locator("figure svg text").all_text_contents()
    numbers = {row[0]: row[1:] for row in rows}
    assert numbers["figure"] == ["one", "two", "change"]
    left, right = first["head"]["tokens_per_s"], second["head"]["tokens_per_s"]
    assert numbers["tokens/s"] == [f"{left:.4g}", f"{right:.4g}", "+25.0 %"]
    assert numbers["acceptance length, coding"][0] == "2.9"
    assert {"one", "two", "Acceptance by position"} <= set(texts)
    assert "+25.0 %" in printed
    assert "acceptance length, writing" in printed


def test_a_page_without_a_baseline_draws_no_speedup() -> None:
    config = build(BenchConfig, {"target": "x", "endpoint": "http://localhost:1"})
    results = {"head": engine(under_load(head_requests(), wall_s=6.0))}
    found = report.build(config, results, measured={})
    found["gates"] = gates.judge(config, found, None)
    text = html.render(found)
    assert "Speed-up over draft length" not in text
    assert "nothing was compared" in text
    assert "How the head was made" not in text


def test_one_load_draws_no_curve_of_a_single_point() -> None:
    found = reports.made()
    found["lineage"] = {**LINEAGE, "walks": [[15, 1.5]]}
    text = html.render(found)
    assert "Acceptance by position" in text
    assert "Training loss" in text
    for missing in ("over concurrency", "over draft length", "Walked", "every other load"):
        assert missing not in text


def slow() -> dict[str, Any]:
    return reports.made(head=engine(under_load(head_requests(), wall_s=12.9)))


def test_where_no_draft_is_faster_the_page_serves_the_target_alone() -> None:
    found = slow()
    assert found["best"][0]["speedup"] == pytest.approx(0.93, abs=0.001)
    text = html.render(found)
    assert "without the head</span>: no draft is faster" in text
    assert '<code class="command">vllm serve tiny</code>' in text
    assert "Best draft length" not in text
    assert "without the head</span>" not in html.render(reports.made())


@needs_browser
def test_each_load_has_its_k_and_a_command_to_copy_also_on_a_phone(tmp_path: Path) -> None:
    found = made()
    (tmp_path / "report.html").write_text(html.render(found))
    with opened(tmp_path / "report.html") as view:
        rows = view.locator("#best tr").all_inner_texts()
        commands = view.locator("#best code").all_inner_texts()
        view.set_viewport_size({"width": 390, "height": 800})
        wide = view.evaluate("document.documentElement.scrollWidth")
        right = view.eval_on_selector_all(
            "#best code", "all => all.map(e => e.getBoundingClientRect().right)"
        )
    assert commands == [best["serve"] for best in found["best"]]
    assert [row.split("\t")[0] for row in rows[1::2]] == ["K = 5", "K = 3"]
    assert wide <= 390
    assert max(right) <= 390


def with_lengths(*lengths: int) -> dict[str, Any]:
    """A report whose prompts have these many tokens, in turn."""
    pairs = zip(head_requests(), itertools.cycle(lengths), strict=False)
    rows = [{**row, "prompt_token_ids": [7] * tokens} for row, tokens in pairs]
    return reports.made(head=engine(under_load(rows, wall_s=6.0)))


def test_figures_by_prompt_length_have_a_table_and_one_length_says_how_to_get_it() -> None:
    bounds = "below 256, 256 to 1,023, 1,024 to 4,095, 4,096 to 16,383, 16,384 to 65,535, 65,536 and more"
    several = html.render(with_lengths(100, 5000))
    assert '<table id="contexts">' in several
    assert 'data-path="/head/contexts/4,096 to 16,383/acceptance/acceptance_length"' in several
    one = html.render(with_lengths(300))
    assert '<table id="contexts">' not in one
    assert "All prompts that were measured have 256 to 1,023 tokens" in one
    assert bounds in one and bounds in several
    blind = with_lengths(300)
    blind["head"]["contexts"] = {}
    assert "the server did not count drafts by request" in html.render(blind)


def test_what_is_no_report_cannot_be_compared(tmp_path: Path) -> None:
    from shared.errors import UserError

    settings = {"first": "one", "second": "two", "workspace": str(tmp_path)}
    with pytest.raises(UserError, match="found nothing for 'one'"):
        run.compare(build(CompareConfig, settings))
    files.write_json(tmp_path / "one" / "bench" / "report.json", {"schema_version": 1})
    with pytest.raises(UserError, match="expected a bench report of schema version 3, found 1"):
        run.compare(build(CompareConfig, settings))
