# SPDX-License-Identifier: Apache-2.0
"""What the stages will take, as the plan of a chain tells it."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import RetryableError
from shared.io import safetensors_files
from shared.io.safetensors_files import TensorInfo
from shared.paths import RunPaths
from stages.ops import expected
from stages.ops.chain import estimates, inputs
from tests.quick.ops.chain.recipes import CPU, steps


def test_estimates_worked_by_hand(workspace: Path) -> None:
    found = estimates.Estimates(steps(workspace), RunPaths(workspace, "run"), CPU).rows()
    by_stage = {row.stage: row for row in found}
    assert by_stage["synth"].work == "5 rows, at most 320 tokens"
    assert by_stage["dump"].disk == "at most 163.8 kB"  # 5 x 64 tokens x 4 states x 64 x 2 bytes
    assert by_stage["train"].work == "5 rows, at most 640 tokens"  # two epochs
    assert by_stage["bench"].work == "2 rows, at most 128 tokens"
    # fc 64 x 192; q 64 x 128, k and v 32 x 128 each, o 64 x 64; MLP 3 x 64 x 128; 4 norms; lm_head
    matrices = 64 * 192 + 128 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    # the norms of EAGLE-3.1's aux states
    others = 4 * 64 + 3 * 64 + 128 * 64
    # weights, gradients and moments in float32: one moment of what Muon moves, two of the rest
    size = 12 * matrices + 16 * others + 2 * (512 + 128) * 64
    assert by_stage["train"].memory == f"{size / 1e3:.1f} kB and activations"
    assert {row.time for row in found} == {"unknown"}


def test_the_plan_quotes_what_others_reached_with_as_many_rows(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start learnt from other rows before; nothing compares with a tiny target."""
    row = {"target": "t", "hidden_size": 64, "samples": 10, "acceptance_length": 2.0, "source": "s"}

    def line(train: dict[str, Any] | None = None) -> str:
        chain = steps(workspace, {"train": train or {}})
        ahead = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU)
        ahead.rows()
        return ahead.expectation()

    assert line() == ""
    monkeypatch.setattr(expected, "published", lambda: [row])
    assert line() == (
        "5 rows x 2 epochs; others reached AL 2.00 from 10 rows (t, s); "
        "bench.min_acceptance_length requires 2.1"
    )
    assert line({"max_samples": 2}).startswith("2 rows x 2 epochs")
    assert line({"init_from": "head"}) == ""


def test_a_target_on_the_hub_is_judged_by_its_config_and_headers(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked once; where it does not answer, nothing is said of sizes."""
    asked: list[str] = []

    def answer(name: str, *_: object) -> tuple[Path, dict[str, TensorInfo]]:
        asked.append(name)
        if name != "org/model":
            raise RetryableError("no hub", code="hub-unreachable", remedy="Wait.")
        return workspace / "model", safetensors_files.list_tensors(workspace / "model")

    monkeypatch.setattr(inputs, "_ask_hub", answer)

    def estimate(name: str, *, asks_hub: bool = True) -> dict[str, estimates.Estimate]:
        chain = steps(workspace, {"run": {"target": name}})
        paths = RunPaths(workspace, "run")
        rows = estimates.Estimates(chain, paths, CPU, asks_hub=asks_hub).rows()
        return {row.stage: row for row in rows}

    here, hub = estimate("model"), estimate("org/model")
    assert hub == here and hub["dump"].disk == "at most 163.8 kB" and hub["dump"].memory
    assert asked == ["org/model"]
    for unknown in (estimate("org/gone"), estimate("org/model", asks_hub=False)):
        assert unknown["dump"].disk == unknown["dump"].memory == ""
    assert asked == ["org/model", "org/gone"]


def test_rows_of_a_hub_are_bounded_by_the_recipe_s_limit(workspace: Path) -> None:
    for limit, work in (
        (20_000, "20,000 rows, at most 1,280,000 tokens"),
        (None, "rows of a hub's data set"),
    ):
        chain = steps(workspace, {"synth": {"prompts": "sharegpt", "max_samples": limit}})
        found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU).rows()
        assert found[0].work == work


@pytest.mark.parametrize(
    ("stage", "changes", "work"),
    [
        ("synth", {"synth": {"prompts": "nowhere.jsonl"}}, "no rows that can be read"),
        ("dump", {"synth": {"prompts": "nowhere.jsonl"}}, "the rows of synth"),
        ("train", {"synth": {"prompts": "nowhere.jsonl"}}, "the rows of dump"),
        ("dump", {"dump": {"states": "states"}}, "the states of dump.states"),
        ("dump", {"dump": {"conversations": "org/rows"}}, "rows of a hub's data set"),
        ("bench", {"bench": {"prompts": None}}, "the prompts that come with bench"),
    ],
)
def test_rows_that_nobody_has_counted_are_said_to_be_what_they_are(
    workspace: Path, stage: str, changes: dict[str, Any], work: str
) -> None:
    chain = steps(workspace, changes)
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU).rows()
    assert {row.stage: row.work for row in found}[stage] == work


def test_estimates_heed_a_source_s_limit_and_bench_s_turns(workspace: Path) -> None:
    (workspace / "turns.jsonl").write_text(json.dumps({"turns": ["first", "second"]}))
    (workspace / "more.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    changes = {
        "synth": {
            "prompts": None,
            "sources": [{"path": "prompts.jsonl", "max_samples": 2}, {"path": "more.jsonl"}],
        },
        "bench": {"prompts": "turns.jsonl"},
    }
    chain = steps(workspace, changes)
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU).rows()
    by_stage = {row.stage: row for row in found}
    assert by_stage["synth"].work == "4 rows, at most 256 tokens"
    assert by_stage["bench"].work == "1 row, at most 128 tokens"  # two answers of 64
