# SPDX-License-Identifier: Apache-2.0
"""What the stages will take, as the plan of a chain tells it."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts.artifact import Artifact
from shared.errors import RetryableError
from shared.io import safetensors_files
from shared.io.safetensors_files import TensorInfo
from shared.paths import RunPaths
from shared.settings import build
from stages.ops import expected
from stages.ops.chain import estimates, inputs
from stages.ops.chain.preflight import checks
from stages.ops.chain.rows import Looks
from tests.quick.ops.chain.recipes import CONFIGS, CPU, steps


def test_estimates_worked_by_hand(workspace: Path) -> None:
    found = estimates.Estimates(
        steps(workspace), RunPaths(workspace, "run"), CPU, Looks(workspace)
    ).rows()
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
        ahead = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace))
        ahead.rows()
        return ahead.expectation()

    assert line() == ""
    monkeypatch.setattr(expected, "published", lambda: [row])
    assert line() == (
        "5 rows x 2 epochs; reached so far: AL 2.00 from 10 rows (t, s); "
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
        rows = estimates.Estimates(chain, paths, CPU, Looks(workspace), asks_hub=asks_hub).rows()
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
        found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace)).rows()
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
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace)).rows()
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
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace)).rows()
    by_stage = {row.stage: row for row in found}
    assert by_stage["synth"].work == "4 rows, at most 256 tokens"
    assert by_stage["bench"].work == "1 row, at most 128 tokens"  # two answers of 64


def test_one_row_to_train_on_is_told_and_no_obstacle(workspace: Path) -> None:
    """As train takes it: nothing is held out then."""
    looks, paths = Looks(workspace), RunPaths(workspace, "run")
    for limit, told in ((1, 1), (2, 0)):
        chain = steps(workspace, {"synth": {"max_samples": limit}})
        assert checks.problems(chain, paths, CPU, looks) == []
        ahead = estimates.Estimates(chain, paths, CPU, looks)
        ahead.rows()
        assert len(list(ahead.warnings())) == told


@pytest.mark.parametrize(
    ("train", "work"),
    [
        ({"batch_tokens": 16}, "5 rows, at most 80 tokens, at most 5 steps"),
        ({"batch_tokens": 4096}, "5 rows, at most 640 tokens, at most 5 steps"),
        ({}, "5 rows, at most 640 tokens, at most 5 steps"),  # auto
    ],
)
def test_the_most_steps_bound_what_train_takes(
    workspace: Path, train: dict[str, Any], work: str
) -> None:
    chain = steps(workspace, {"train": {"max_steps": 5, **train}})
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace)).rows()
    assert {row.stage: row.work for row in found}["train"] == work


DAY_S = 86_400


def make_earlier(
    workspace: Path, stage: str, name: str, *, days: int, seconds: int, **settings: str
) -> None:
    """A finished run of ten rows, and of 50 steps, so many days after the first one."""
    flags = {"recipe": str(workspace / "recipe.yaml"), "workspace": str(workspace), "name": name}
    config = build(CONFIGS[stage], {**flags, **settings})
    artifact = Artifact(config.paths.stage(stage), config)
    with artifact.work():
        counts = {"in": 10, "ok": 10, "skipped": {}, "failed": {}}
        artifact.finish([], counts=counts, facts={"steps": 50} if stage == "train" else {})
    ended_s = 1.7e9 + days * DAY_S
    path = artifact.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    ended = datetime.datetime.fromtimestamp(ended_s, datetime.UTC)
    manifest["provenance"]["finished"] = ended.isoformat(timespec="seconds")
    path.write_text(json.dumps(manifest))
    record = {"state": "done", "pid": 1, "host": "h", "started_s": ended_s - seconds}
    status = RunPaths(workspace, name).status(stage)
    status.parent.mkdir(parents=True, exist_ok=True)
    status.write_text(json.dumps({**record, "updated_s": ended_s}))


def time_of(workspace: Path, stage: str, changes: dict[str, Any]) -> str:
    chain = steps(workspace, changes)
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU, Looks(workspace)).rows()
    return {row.stage: row.time for row in found}[stage]


def test_a_stage_takes_as_long_as_the_newest_one_with_its_settings(workspace: Path) -> None:
    vllm = {"dump": {"backend": "vllm"}}
    make_earlier(workspace, "dump", "adapted", days=5, seconds=2, backend="hf")
    assert time_of(workspace, "dump", vllm) == "about 1 s (as adapted took, with other backend)"
    make_earlier(workspace, "dump", "demo", days=2, seconds=42, backend="vllm")
    make_earlier(workspace, "dump", "before", days=1, seconds=90, backend="vllm")
    assert time_of(workspace, "dump", vllm) == "about 21 s (as demo took)"
    half = {"dump": {"backend": "vllm", "engine_args": {"max_num_seqs": 1}}}
    assert (
        time_of(workspace, "dump", half)
        == "about 1 s (as adapted took, with other backend, engine_args)"
    )
    assert time_of(workspace, "dump", {}) == "about 1 s (as adapted took)"


def test_a_batch_that_train_chose_is_no_other_setting(workspace: Path) -> None:
    make_earlier(workspace, "train", "whole", days=1, seconds=100, batch_tokens="512")
    assert time_of(workspace, "train", {}) == "about 50 s (as whole took)"
    assert (
        time_of(workspace, "train", {"train": {"batch_tokens": 256}})
        == "about 50 s (as whole took, with other batch_tokens)"
    )


def test_a_training_of_few_steps_takes_as_long_as_those(workspace: Path) -> None:
    make_earlier(workspace, "train", "whole", days=1, seconds=100)  # 10 rows x 2 epochs
    assert time_of(workspace, "train", {}) == "about 50 s (as whole took)"
    assert time_of(workspace, "train", {"train": {"epochs": 4}}) == "about 2 min (as whole took)"
    assert time_of(workspace, "train", {"train": {"max_steps": 10}}) == "about 20 s (as whole took)"
    assert (
        time_of(workspace, "train", {"train": {"max_steps": 999}}) == "about 50 s (as whole took)"
    )
    make_earlier(workspace, "train", "short", days=2, seconds=7, max_steps="9")
    assert time_of(workspace, "train", {}) == "about 50 s (as whole took)"
