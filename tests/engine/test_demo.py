# SPDX-License-Identifier: Apache-2.0
"""The demo, as its user runs it: all four stages on real vLLM, and once more."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shared.contracts import conversations, hidden_states
from shared.prompts.sources import read_source
from shared.settings import build
from shared.vllm.measured_rows import conversation_of
from stages.bench.config import BenchConfig
from stages.bench.measure import measurement, plans
from tests.conftest import make_target, ops
from tests.engine.conftest import RECIPE, Demo

pytestmark = pytest.mark.engine

LIMIT_S = 15 * 60  # less than eight minutes on two cores that do nothing else


def test_the_demo_reaches_its_bars_in_time(demo: Demo) -> None:
    report = json.loads((demo.run / "bench" / "report.json").read_text())
    head = report["head"]["acceptance"]
    assert report["num_speculative_tokens"] == 3
    assert head["acceptance_length"] >= 3.0
    per_step = [report[name]["tokens_per_step"] for name in ("head", "ngram")]
    assert per_step[0] - per_step[1] >= 1.5
    assert demo.seconds is None or demo.seconds < LIMIT_S


def test_its_last_line_is_machine_readable(demo: Demo) -> None:
    last = demo.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"demo: acceptance_length=(\d\.\d\d) head=(\S+) report=(\S+)", last)
    assert found
    report = json.loads((demo.run / "bench" / "report.json").read_text())
    assert float(found[1]) == round(report["head"]["acceptance"]["acceptance_length"], 2)
    assert found[2] == str(demo.export)
    assert found[3] == str(demo.run / "bench" / "report.json")


def test_figures_follow_from_vllms_own_counters(demo: Demo) -> None:
    """Computed here from the raw readings, by other code than bench's."""
    report = json.loads((demo.run / "bench" / "report.json").read_text())
    raw = json.loads((demo.run / "bench" / "raw" / "head.json").read_text())
    ((segment,),) = (load["segments"] for load in raw["loads"])
    before, after = segment["counters_before"], segment["counters_after"]
    drafts = after["num_drafts"] - before["num_drafts"]
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    per_request = [request["counters"] for request in segment["requests"]]
    assert drafts == sum(counted["num_drafts"] for counted in per_request)
    assert accepted == sum(counted["num_accepted_tokens"] for counted in per_request)
    assert drafted == 3 * drafts
    figures = report["head"]["acceptance"]
    assert figures["acceptance_length"] == pytest.approx(1 + accepted / drafts)
    assert figures["acceptance_rate"] == pytest.approx(accepted / drafted)


def test_its_report_is_whole(demo: Demo) -> None:
    report = json.loads((demo.run / "bench" / "report.json").read_text())
    head = report["head"]
    lines = (demo.target / "held_out.jsonl").read_text().splitlines()
    assert set(head["categories"]) == {json.loads(line)["category"] for line in lines}
    drafts = [entry["counters"]["num_drafts"] for entry in head["categories"].values()]
    assert sum(drafts) == head["counters"]["num_drafts"]
    low, high = head["acceptance"]["acceptance_length_interval"]
    assert low < head["acceptance"]["acceptance_length"] < high
    assert (demo.run / "bench" / "report.html").read_text().startswith("<!doctype html>")


def test_greedy_answers_are_identical_or_part_at_a_tie(demo: Demo) -> None:
    lossless = json.loads((demo.run / "bench" / "report.json").read_text())["lossless"]
    assert lossless["compared"] == 96
    assert lossless["identical"] + lossless["ties"] == 96
    assert lossless["wrong"] == 0
    for divergence in lossless["divergences"]:
        assert divergence["gap"] <= lossless["noise_logits"]


def test_a_planted_wrong_token_is_caught(demo: Demo, tmp_path: Path) -> None:
    """The demo's own answers, one token of one of them changed: the plain engine names it."""
    raw = json.loads((demo.run / "bench" / "raw" / "head.json").read_text())
    rows = raw["loads"][0]["segments"][0]["requests"]
    kept = {row["id"] for row in rows[:6]}
    victim = rows[2]
    position = len(victim["token_ids"]) // 2
    right = victim["token_ids"][position]
    victim["token_ids"][position] = (right + 7) % 800
    config = build(BenchConfig, {"recipe": str(RECIPE), "workspace": str(demo.workspace)})
    conversations = [
        conversation
        for row in read_source(config.prompts, demo.workspace, label="bench.prompts")
        if (conversation := conversation_of(row)).id in kept
    ]
    plan = plans.plan_of(config, demo.target, conversations)
    lossless = measurement.measure(plan, "baseline", None, tmp_path, others={"head": raw})[
        "lossless"
    ]
    assert lossless["compared"] == 6
    wrong = [d for d in lossless["divergences"] if d["verdict"] != "tie"]
    ((name, turn, at, expected),) = [
        (d["id"], d["turn"], d["position"], d["baseline_token"]) for d in wrong
    ]
    assert (name, turn, at, expected) == (victim["id"], 0, position, right)
    assert lossless["wrong"] == 1


def test_again_is_done_within_seconds_and_redoes_nothing(demo: Demo) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.workspace.rglob("*.json")}
    manifests = [path for path in before if path.name == "manifest.json"]
    assert len(manifests) == 5
    started_s = time.monotonic()
    assert make_target(demo.workspace, demo.target).returncode == 0
    assert ops(demo.workspace, "run", "--recipe", str(RECIPE)).returncode == 0
    assert time.monotonic() - started_s < 60  # minutes if it were done anew
    for path, written in before.items():
        if path.parent.name != "status":
            assert path.stat().st_mtime_ns == written, path


def test_held_out_prompts_were_never_trained_on(demo: Demo) -> None:
    def prompts(name: str) -> set[str]:
        lines = (demo.target / name).read_text().splitlines()
        return {json.loads(line)["prompt"] for line in lines}

    assert prompts("held_out.jsonl")
    assert not prompts("held_out.jsonl") & prompts("prompts.jsonl")
    answered = conversations.read_conversations(demo.run / "synth")
    trained = {row.messages[0]["content"] for row in answered}
    assert not prompts("held_out.jsonl") & trained


def test_every_row_is_accounted_for(demo: Demo) -> None:
    asked = len((demo.target / "prompts.jsonl").read_text().splitlines())
    for stage in ("synth", "dump", "train"):
        counts = json.loads((demo.run / stage / "manifest.json").read_text())["counts"]
        skipped, failed = counts["skipped"].values(), counts["failed"].values()
        assert counts["in"] == counts["ok"] + sum(skipped) + sum(failed) == asked, stage
        asked = counts["ok"]


def test_synths_ids_are_what_the_template_and_the_answer_make(demo: Demo) -> None:
    """The server's own ids, held to transformers' tokenizer and template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.target)
    for row in list(conversations.read_conversations(demo.run / "synth"))[:200]:
        prompt = tokenizer.apply_chat_template(
            list(row.messages[:-1]), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ((start, end),) = row.loss_spans
        assert list(row.input_ids[:start]) == prompt
        assert end == len(row.input_ids) == row.num_prompt_tokens + row.num_completion_tokens
        text = tokenizer.decode(row.input_ids[start:end], skip_special_tokens=True)
        assert text == row.messages[-1]["content"]


def test_dump_says_what_its_states_are(demo: Demo) -> None:
    facts = json.loads((demo.run / "dump" / hidden_states.DATA_CONFIG).read_text())
    assert facts["hidden_states"]["aux_layer_ids"] == [2, 4, 5]
    assert facts["hidden_states"]["layer_ids"] == [2, 4, 5, 8]
    assert facts["hidden_states"]["final_hidden"] == "prenorm"
    agreement = json.loads((demo.run / "dump" / "manifest.json").read_text())["facts"]["agreement"]
    assert agreement > 0.95


def test_the_walk_foretold_the_bench(demo: Demo) -> None:
    """Other prompts of the same kinds, so not equal; a wrong alignment is far outside."""
    trained = json.loads((demo.run / "train" / "manifest.json").read_text())["facts"]
    report = json.loads((demo.run / "bench" / "report.json").read_text())
    measured = report["head"]["acceptance"]["acceptance_length"]
    assert trained["walked_acceptance_length"] == pytest.approx(measured, rel=0.1)


def test_no_secret_is_written_anywhere(demo: Demo) -> None:
    log = (demo.run / "logs" / "synth.log").read_text(errors="replace")
    assert "starting the vLLM server" in log
    for path in demo.run.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".log", ".yaml", ".md"):
            text = path.read_text(errors="replace")
            assert "VLLM_API_KEY=" not in text
            assert "api_key': '" not in text.replace("api_key': ''", "")


def test_its_run_validates_and_a_damaged_copy_does_not(demo: Demo, tmp_path: Path) -> None:
    whole = ops(demo.workspace, "validate", "demo", "--json")
    assert whole.returncode == 0, whole.stdout
    assert json.loads(whole.stdout)["skipped"] == 0
    shutil.copytree(demo.run, tmp_path / "demo", symlinks=True)
    # The copy's target stays where it was: one that is missing is not asked about, and no fault.
    shard = tmp_path / "demo" / "dump" / "shard_00000.pt"
    with shard.open("r+b") as handle:
        handle.seek(shard.stat().st_size // 2)
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))
    damaged = ops(tmp_path, "validate", "demo", "--json")
    assert damaged.returncode == 3
    (failed,) = [f for f in json.loads(damaged.stdout)["findings"] if f["verdict"] == "FAIL"]
    assert (failed["artifact"], failed["question"]) == ("dump", "files")
    assert f"{shard}: expected the SHA-256" in failed["detail"]


def test_a_plan_of_its_target_tells_its_size(demo: Demo) -> None:
    planned = ops(demo.workspace, "plan", str(demo.target), "--json")
    assert planned.returncode == 0
    plan = json.loads(planned.stdout)
    weights = load_file(demo.target / "model.safetensors").values()
    assert plan["weight_bytes"] == sum(each.numel() * each.element_size() for each in weights)
    assert plan["dump_backend"]["name"] == "vllm"
