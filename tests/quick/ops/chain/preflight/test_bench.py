# SPDX-License-Identifier: Apache-2.0
"""What bench would refuse after hours, told before the first stage: prompts and the earlier report."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.prompts import sources
from shared.prompts.sources import Source
from shared.target.model import read_config
from stages.ops.chain.preflight.bench_prompts import room_problems
from tests.quick.bench.report import reports
from tests.quick.ops.chain.recipes import problems, steps


def told(workspace: Path, bench: dict[str, Any]) -> list[str]:
    return problems(steps(workspace, {"bench": bench}), workspace)


def write_prompts(workspace: Path, *rows: dict[str, Any]) -> None:
    (workspace / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_prompt_that_warms_up_is_named(workspace: Path) -> None:
    write_prompts(workspace, {"prompt": "Why?"}, {"id": "w", "prompt": "Hello there."})
    (line,) = told(workspace, {})
    assert "bench.prompts: expected none of the warm-up's texts" in line and "['w']" in line
    assert told(workspace, {"max_prompts": 1}) == []  # bench does not read so far
    write_prompts(workspace, {"turns": ["Why?", "Hello there."]})
    assert told(workspace, {}) == []  # where a conversation goes on it is no warm-up


def test_a_prompt_that_is_too_long_for_the_target_is_named(real_target: Path) -> None:
    rows = [{"id": "short", "prompt": "Why?"}, {"id": "long", "prompt": "why " * 400}]
    write_prompts(real_target, *rows)
    (line,) = told(real_target, {})
    assert line.startswith("bench: prompt long of ") and "the engine has 256" in line
    assert told(real_target, {"max_prompts": 1}) == []
    turns = [{"turns": ["Why?"] * 4}]  # each answer is in the next one's prompt
    write_prompts(real_target, *turns)
    assert "needs " in told(real_target, {})[0]
    assert told(real_target, {"max_tokens": 16}) == []


def test_without_transformers_nothing_is_said_of_lengths(
    real_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ops image has none."""
    write_prompts(real_target, {"prompt": "why " * 400})
    found = steps(real_target, {"bench": {}})
    config = read_config(real_target / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    bench = next(step for step in found if step.stage == "bench")
    assert [*room_problems(bench, config, real_target)] == []


def test_without_a_tokenizer_nothing_is_said_of_lengths(workspace: Path) -> None:
    write_prompts(workspace, {"prompt": "why " * 400})
    assert told(workspace, {}) == []


def earlier(workspace: Path, **changes: Any) -> dict[str, Any]:
    """A report of the recipe's bench, with changes."""
    digest = sources.digest(Source(path="held_out.jsonl"), workspace, label="")
    load = {"target": "model", "max_prompts": 2, "max_tokens": 64}
    report = {**reports.made(), **load, "measured": {"prompts": digest}, **changes}
    (workspace / "report.json").write_text(json.dumps(report))
    return {"earlier_report": "report.json"}


def test_an_earlier_report_of_the_same_is_no_obstacle(workspace: Path) -> None:
    assert told(workspace, earlier(workspace)) == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_speculative_tokens": 5}, "num_speculative_tokens: 5 then, 3 now"),
        ({"target": "other"}, "target: other then, model now"),
        ({"concurrency": 8}, "concurrency: 8 then, 1 now"),
        ({"temperature": 0.7}, "temperature: 0.7 then, 0.0 now"),
        ({"mode": "endpoint"}, "mode: endpoint then, served now"),
        ({"measured": {"prompts": "abc"}}, "prompts: abc then"),
    ],
)
def test_an_earlier_report_of_something_else_is_named(
    workspace: Path, changes: dict[str, Any], difference: str
) -> None:
    (line,) = told(workspace, earlier(workspace, **changes))
    assert "report.json measured something else" in line and difference in line


def test_benchs_own_prompts_are_known(workspace: Path) -> None:
    (line,) = told(workspace, {**earlier(workspace), "prompts": None})
    assert "prompts: " in line and "measured something else" in line
