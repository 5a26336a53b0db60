# SPDX-License-Identifier: Apache-2.0
"""From raw measurements made up by hand to the report."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from shared.errors import OutputError
from stages.bench.report import gates, report, terminal
from tests.measurements import (
    baseline_requests,
    engine,
    head_requests,
    lossless,
    request,
    under_load,
)
from tests.quick.bench.report.reports import config, made, results


def test_figures_worked_by_hand() -> None:
    found = made()
    head = found["head"]
    # 40 drafts; 2 x 19 + 2 x 10 = 58 accepted; by position 2 x (8 + 6), 2 x (7 + 3), 2 x (4 + 1).
    assert head["counters"]["num_accepted_tokens_per_pos"] == (28, 20, 10)
    assert head["acceptance"]["acceptance_length"] == pytest.approx(1 + 58 / 40)
    assert head["acceptance"]["acceptance_rate"] == pytest.approx(58 / 120)
    assert head["acceptance"]["per_position"] == pytest.approx((28 / 40, 20 / 40, 10 / 40))
    assert head["acceptance"]["conditional"] == pytest.approx((28 / 40, 20 / 28, 10 / 20))
    assert head["tokens_per_s"] == pytest.approx(120 / 6)
    assert found["baseline"]["tokens_per_s"] == pytest.approx(120 / 12)
    assert head["speedup"] == pytest.approx(2.0)
    assert head["speedup_interval"] == pytest.approx([2.0, 2.0])
    assert head["ttft_s"] == pytest.approx({"median": 0.1, "p99": 0.1})


def test_categories_add_up_to_the_whole() -> None:
    head = made()["head"]
    coding, writing = head["categories"]["coding"], head["categories"]["writing"]
    assert coding["acceptance"]["acceptance_length"] == pytest.approx(2.9)
    assert writing["acceptance"]["acceptance_length"] == pytest.approx(2.0)
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert coding["counters"][name] + writing["counters"][name] == head["counters"][name]
    assert coding["requests"] + writing["requests"] == head["requests"] == 4
    assert coding["speedup"] == pytest.approx(2.0)
    low, high = head["acceptance"]["acceptance_length_interval"]
    assert 2.0 <= low < head["acceptance"]["acceptance_length"] < high <= 2.9


def test_requests_that_do_not_add_up_are_refused() -> None:
    rows = head_requests()
    stranger = request("stranger", "coding", [1, 0, 0, 0], tokens=2, latency_s=1.0)
    counted = under_load([*rows, stranger], wall_s=6.0)
    counted["segments"][0]["requests"] = rows  # the engine counted one request more
    with pytest.raises(OutputError, match="something else ran on it"):
        made(head=engine(counted))


def test_an_engine_without_counts_by_request_is_read_by_category() -> None:
    segments = []
    for category in ("coding", "writing"):
        rows = [row for row in head_requests() if row["category"] == category]
        (segment,) = under_load(rows, wall_s=3.0)["segments"]
        blind = [{**row, "counters": None} for row in rows]
        segments.append({**segment, "category": category, "requests": blind})
    by_category = {**under_load(head_requests(), wall_s=6.0), "segments": segments}
    head = made(head=engine(by_category))["head"]
    whole = made()["head"]
    assert head["counters"] == whole["counters"]
    assert head["tokens_per_s"] == whole["tokens_per_s"]
    for name in ("coding", "writing"):
        length = head["categories"][name]["acceptance"]["acceptance_length"]
        assert length == whole["categories"][name]["acceptance"]["acceptance_length"]
    assert head["acceptance"]["acceptance_length_interval"] is None


def test_the_command_names_local_files_by_their_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is typed wherever the operator happens to be, and a target of a recipe lies in the workspace."""
    monkeypatch.chdir(tmp_path)
    for name in ("there/tiny", "there/run/export"):
        (tmp_path / name).mkdir(parents=True)
    words = shlex.split(made(config(workspace="there", name="run"))["best"][0]["serve"])
    assert words[2] == str(tmp_path / "there" / "tiny")
    assert json.loads(words[4])["model"] == str(tmp_path / "there" / "run" / "export")


def test_each_load_has_a_command_that_serves_it() -> None:
    flags = {
        "head": "org/head",
        "speculative_args": "{draft_tensor_parallel_size: 1}",
        "engine_args": "{model_impl: transformers, enable_prefix_caching: false, max_num_seqs: 8, "
        "enforce_eager: true, cudagraph_capture_sizes: [1, 8], max_logprobs: null}",
        "reasoning": "disable",
    }
    words = shlex.split(made(config(**flags))["best"][0]["serve"])
    assert words[:4] == ["vllm", "serve", "tiny", "--speculative-config"]
    assert json.loads(words[4]) == {
        "method": "eagle3",
        "model": "org/head",
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": 1,
    }
    assert words[5] == "--default-chat-template-kwargs"
    off = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
    assert json.loads(words[6]) == off
    assert words[7:] == [
        *("--model-impl", "transformers"),
        "--no-enable-prefix-caching",
        *("--max-num-seqs", "8"),
        "--enforce-eager",
        *("--cudagraph-capture-sizes", "1", "8"),
    ]


def test_the_command_serves_the_weights_that_were_measured() -> None:
    flags = {"target": "org/target", "target_revision": "v1", "head": "org/head"}
    told = {"trust-remote-code": True, "dtype": "float16", "chat-template": Path("/run/a.jinja")}
    chosen = config(**flags, head_revision="v2", engine_args="{max_num_seqs: 8}")
    words = shlex.split(made(chosen, serving=told)["best"][0]["serve"])
    assert words[:5] == ["vllm", "serve", "org/target", "--revision", "v1"]
    assert json.loads(words[6])["revision"] == "v2"
    assert words[7:] == [
        "--trust-remote-code",
        *("--dtype", "float16"),
        *("--chat-template", "/run/a.jinja"),
        *("--max-num-seqs", "8"),
    ]


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    for name in ("tiny", "head"):
        (tmp_path / name).mkdir()
    flags = {"target_revision": "v1", "head": "head", "head_revision": "v2"}
    words = shlex.split(made(config(workspace=str(tmp_path), **flags))["best"][0]["serve"])
    assert "--revision" not in words
    assert "revision" not in json.loads(words[4])


def test_where_drafting_costs_more_than_it_saves_the_command_serves_the_target_alone() -> None:
    slow = {"head": engine(under_load(head_requests(), wall_s=24.0))}
    found = made(**slow)
    assert found["best"][0]["serve"] == "vllm serve tiny"
    lines = [line for line in terminal.sentences(found) if "to serve" in line]
    assert lines == [
        "to serve at concurrency 1, temperature 0, max_tokens 256, without the head, which costs more "
        "than it saves: vllm serve tiny"
    ]


@pytest.mark.parametrize(("method", "warned"), [("synthetic", 1), ("fly", 1), ("block", 0)])
def test_a_lossy_verifier_is_named(method: str, warned: int) -> None:
    for name in ("rejection_sample_method", "rejection-sample-method"):
        settings = config(speculative_args=f"{{{name}: {method}}}")
        found = [line for line in made(settings)["warnings"] if "lossy" in line and method in line]
        assert len(found) == warned


def test_figures_by_the_length_of_the_prompt() -> None:
    def long_ones(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The prompts of `writing` get 5,000 tokens, the others have 3."""
        tokens = {"coding": [1, 2, 3], "writing": [7] * 5000}
        return [{**row, "prompt_token_ids": tokens[row["category"]]} for row in rows]

    head = made(
        head=engine(under_load(long_ones(head_requests()), wall_s=6.0)),
        baseline=engine(
            under_load(long_ones(baseline_requests()), wall_s=12.0), lossless=lossless()
        ),
    )["head"]
    assert list(head["contexts"]) == ["below 256", "4,096 to 16,383"]
    for context, category in zip(head["contexts"].values(), ("coding", "writing"), strict=True):
        same = head["categories"][category]
        assert context["acceptance"] == same["acceptance"]
        assert context["speedup"] == same["speedup"] == pytest.approx(2.0)
        assert context["ttft_s"] == same["ttft_s"]


def test_a_sweep_names_the_best_k_of_each_load() -> None:
    settings = config(num_speculative_tokens="[3,5]", concurrency="[1,8]")

    def loads(*seconds: float, rows: Any = head_requests, depth: int = 3) -> dict[str, Any]:
        made_loads = [
            under_load(rows(), wall_s=wall_s, concurrency=concurrency, depth=depth)
            for wall_s, concurrency in zip(seconds, (1, 8), strict=True)
        ]
        return engine(*made_loads, lossless=lossless())

    def deeper() -> list[dict[str, Any]]:
        return [
            request(f"{n}", "coding", [2, 1, 3, 4, 0, 0], tokens=30, latency_s=1.0)
            for n in range(4)
        ]

    found = report.build(
        settings,
        {
            "head": loads(6.0, 3.0),
            "head-k5": loads(5.0, 4.0, rows=deeper, depth=5),
            "baseline": loads(12.0, 4.0, rows=baseline_requests),
        },
        measured={},
    )
    rows = {(r["drafter"], r["num_speculative_tokens"], r["concurrency"]) for r in found["sweep"]}
    assert rows == {
        (drafter, depth, load)
        for drafter, depth in (("baseline", 0), ("head", 3), ("head", 5))
        for load in (1, 8)
    }
    best = {row["concurrency"]: row for row in found["best"]}
    assert best[1]["num_speculative_tokens"] == 5
    assert best[1]["speedup"] == pytest.approx(12 / 5)
    assert best[8]["num_speculative_tokens"] == 3
    assert best[8]["speedup"] == pytest.approx(4 / 3)
    told = [line for line in terminal.sentences(found) if "to serve" in line]
    assert [line.split(": ")[0] for line in told] == [
        "to serve at concurrency 1, temperature 0, max_tokens 256, K = 5",
        "to serve at concurrency 8, temperature 0, max_tokens 256, K = 3",
    ]
    assert found["num_speculative_tokens"] == 3
    assert found["concurrency"] == 1


def test_a_slow_head_and_a_missing_baseline_are_said() -> None:
    slow = made(head=engine(under_load(head_requests(scale=4.0), wall_s=24.0)))
    assert any(
        "Drafting costs more than it saves here (speed-up 0.50)" in w for w in slow["warnings"]
    )
    alone = report.build(config(), {"head": results()["head"]}, measured={})
    assert any("No baseline was measured" in warning for warning in alone["warnings"])
    assert "speedup" not in alone["head"]


def test_ngram_is_compared_by_tokens_per_step_and_not_by_acceptance_length() -> None:
    """ngram drafts in one step of many: 3 accepted of its one draft, and 26 steps without any."""
    seldom = [
        request(f"{category}-{n}", category, [0, 0, 0, 1], tokens=30, latency_s=1.0)
        for category in ("coding", "writing")
        for n in range(2)
    ]
    settings = config(compare_ngram="true", min_gain_over_ngram="1.0")
    found = made(settings, ngram=engine(under_load(seldom, wall_s=9.0)))
    assert found["ngram"]["acceptance"]["acceptance_length"] == 4.0  # above the head's 2.45
    assert found["ngram"]["tokens_per_step"] == pytest.approx(29 / 26)
    # The head: 2 answers of 10 drafts and 29 tokens, 2 of 10 drafts, 20 tokens and 9 steps more.
    assert found["head"]["tokens_per_step"] == pytest.approx(4 * 29 / (2 * 10 + 2 * 19))
    assert gates.shortfalls(found["gates"]) == [
        f"tokens per step above ngram's {2 - 29 / 26:.3f} is {29 / 26 - 1:.3f} under the gate 1"
    ]


def test_a_load_that_waited_in_the_queue_is_reported_as_such() -> None:
    crowded = under_load(head_requests(), wall_s=6.0, concurrency=6, queue_s=3.0)
    found = made(config(concurrency="6"), head=engine(crowded))
    assert found["head"]["queued_share"] == pytest.approx(3.0 / 6.0)
    (warning,) = (text for text in found["warnings"] if "queue" in text)
    assert warning.startswith("head at concurrency 6: requests spent 50% of their time")
    assert not any("queue" in text for text in made()["warnings"])


def test_a_busy_machine_is_named() -> None:
    crowded = [
        engine(under_load(rows, wall_s=6.0), busy_share=share, **more)
        for rows, share, more in (
            (head_requests(), 0.62, {}),
            (head_requests(), 0.2, {}),
            (baseline_requests(), 0.31, {"lossless": lossless()}),
        )
    ]
    found = made(**dict(zip(("head", "ngram", "baseline"), crowded, strict=True)))
    (told,) = [text for text in found["warnings"] if "Other processes" in text]
    assert told.startswith(
        "Other processes were using CPU cores of this machine (62% of them before head was started, "
        "31% of them before baseline was started), which makes tokens/s"
    )
    assert told in terminal.sentences(found)
    assert not any("Other processes" in text for text in made()["warnings"])


@pytest.mark.parametrize(("cut", "is_told"), [(3, True), (1, True), (0, False)])
def test_answers_that_are_cut_are_counted(cut: int, is_told: bool) -> None:
    rows = baseline_requests()
    rows = [{**row, "finish_reason": "length"} for row in rows[:cut]] + rows[cut:]
    plain = engine(under_load(rows, wall_s=12.0), lossless=lossless())
    found = made(baseline=plain)
    assert found["baseline"]["cut"] == cut
    told = [text for text in found["warnings"] if "max_tokens" in text]
    if not is_told:
        assert told == []
        return
    assert told == [
        f"{cut} of the 4 answers without a drafter are cut at max_tokens 256: the figures hold "
        "for the first 256 tokens of an answer. Raise bench.max_tokens to measure whole answers."
    ]
    assert told[0] in terminal.sentences(found)


def test_a_category_has_no_speedup_of_its_own_in_a_larger_batch() -> None:
    measured = {
        name: engine(under_load(rows, wall_s=wall_s, concurrency=8), lossless=lossless())
        for name, rows, wall_s in (
            ("head", head_requests(), 6.0),
            ("baseline", baseline_requests(), 12.0),
        )
    }
    head = made(config(concurrency="8"), **measured)["head"]
    assert head["speedup"] == pytest.approx(2.0)
    assert "speedup" not in head["categories"]["coding"]
