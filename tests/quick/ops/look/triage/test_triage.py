# SPDX-License-Identifier: Apache-2.0
"""Every known failure gets its diagnosis, and a clean log gets none."""

import dataclasses
import re
from pathlib import Path

import pytest

from shared.config import RunConfig
from shared.settings import flag_fields
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig, ParityConfig
from stages.ops.config import RunChainConfig, TriageConfig
from stages.ops.look.triage.case import Case, open_case
from stages.ops.look.triage.diagnosis import Outcome, diagnose
from stages.ops.look.triage.failure_rules import Rule, read_rules
from stages.ops.look.triage.wording import render
from stages.synth.config import SynthConfig
from stages.train.commands import ExportConfig
from stages.train.config import TrainConfig
from tests.triage.cases import FailureCase, read_cases

RULES = read_rules()
# Of Docker, Slurm, kubectl and their like.
OTHERS_FLAGS = frozenset(
    (
        "help",
        "exclude",
        "ipc",
        "mem",
        "time",
        "gres",
        "gpus",
        "pids",
        "previous",
        "platform",
        "ulimit",
    )
)
CASES = read_cases()


def triage(path: Path) -> Outcome:
    case = open_case([path], recipe=None, workspace=path.parent, exit_codes={})
    return diagnose(case, RULES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_first_diagnosis_is_the_right_one(case: FailureCase, tmp_path: Path) -> None:
    outcome = triage(case.lay_out(tmp_path))
    found = [diagnosis.rule for diagnosis in outcome.diagnoses]
    assert (found or [""])[0] == case.expect, found
    if case.benign:
        assert case.benign in {hit.rule.id for hit in outcome.benign}


# The seeds' four tables of failures: the rule of each row.
KNOWN_ROWS = {
    "synthesis": (
        "server-not-ready",
        "cuda-out-of-memory",
        "hub-name-unknown",
        "tokenizer-fails",
        "architecture-unsupported",
        "slurm-time-limit",
        "empty-data-out",
    ),
    "dump": (
        "launcher-script-missing",
        "launcher-synth-output-missing",
        "cuda-out-of-memory",
        "launcher-trtllm-unsupported",
        "nccl-timeout",
        "launcher-no-states-written",
        "pyxis-sigterm",
    ),
    "training": (
        "launcher-dump-output-missing",
        "cuda-out-of-memory",
        "launcher-training-architecture",
        "loss-nan",
        "launcher-export-failed",
    ),
    "benchmark": (
        "launcher-export-missing",
        "trust-remote-code",
        "head-not-loadable",
        "acceptance-below-gate",
        "cuda-out-of-memory",
        "eagle3-unsupported",
    ),
}
CLEAN = [case for case in CASES if case.kind == "recorded" and not case.expect]


@pytest.mark.parametrize("case", CLEAN, ids=[case.name for case in CLEAN])
def test_a_clean_log_is_clean_even_where_nothing_says_done(
    case: FailureCase, tmp_path: Path
) -> None:
    log = "".join(line for line in case.log.splitlines(True) if "done: " not in line)
    path = dataclasses.replace(case, status=None).lay_out(tmp_path, log)
    assert [diagnosis.rule for diagnosis in triage(path).diagnoses] == []


@pytest.mark.parametrize(
    ("last_line", "is_clean"),
    [
        ("server pid 12 terminated", True),
        ("late request 7 denied execution, scheduler is shutting down", True),
        ("server pid 12 terminated unexpectedly", False),
        ("engine failed, server is shutting down", False),
    ],
)
def test_a_program_that_was_told_to_end_raises_no_alarm(
    last_line: str, is_clean: bool, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    log.write_text(f"INFO 11-21 13:12:01 [launcher.py:1] last answer written\n{last_line}\n")
    assert (triage(log).diagnoses == []) == is_clean


@pytest.mark.parametrize(
    ("error", "is_clean"),
    [
        ("curl: (7) Failed to connect to localhost port 8000 after 0 ms", True),
        ("Traceback (most recent call last):\nConnectionError: Connection refused", False),
        ("OSError: [Errno 28] No space left on device", False),
        ("ERROR: the answers differ", False),
    ],
)
def test_a_good_end_takes_back_a_vague_error_alone(
    error: str, is_clean: bool, tmp_path: Path
) -> None:
    log = tmp_path / "script.log"
    log.write_text(f"waiting for the server\n{error}\nsent 100 prompts\ndone\n")
    assert (triage(log).diagnoses == []) == is_clean


@pytest.mark.parametrize(("steps", "is_clean"), [(3, True), (1, False)])
def test_progress_takes_back_an_error_that_nothing_names(
    steps: int, is_clean: bool, tmp_path: Path
) -> None:
    """A bar is drawn once more when its program ends."""
    lines = ["collect2: error: ld returned 1 exit status"]
    lines += [f"step={step}, loss=2.0" for step in range(steps)]
    log = tmp_path / "script.log"
    log.write_text("\n".join(lines) + "\n")
    assert (triage(log).diagnoses == []) == is_clean


def test_enough_failures_were_real() -> None:
    real = [case for case in CASES if case.kind in ("recorded", "reported") and case.expect]
    assert len({case.expect for case in real}) >= 40
    assert all(case.source for case in CASES)


def test_every_rule_has_a_log() -> None:
    shown = {case.expect for case in CASES} | {case.benign for case in CASES}
    assert {rule.id for rule in RULES} - shown == set()


def test_no_row_of_the_known_tables_is_left_out() -> None:
    assert {rule for rows in KNOWN_ROWS.values() for rule in rows} <= {rule.id for rule in RULES}


def test_what_bench_sets_itself_is_not_told_to_be_set_in_its_free_options() -> None:
    (rule,) = [each for each in RULES if each.id == "speculative-config-rejected"]
    assert {"bench.num_speculative_tokens", "bench.head"} <= set(
        re.findall(r"bench\.\w+", rule.fix)
    )


def test_what_a_fix_tells_to_set_is_there_to_be_set() -> None:
    commands = (SynthConfig, DumpConfig, ParityConfig, TrainConfig, ExportConfig, BenchConfig)
    operators = (TriageConfig, RunChainConfig)
    flags = {name for command in (*commands, *operators) for name in flag_fields(command)}
    keys = {f"run.{name}" for name in RunConfig.model_fields}
    for stage, config in (("synth", SynthConfig), ("dump", DumpConfig), ("train", TrainConfig)):
        keys |= {f"{stage}.{name}" for name in config.model_fields}
    keys |= {f"bench.{name}" for name in BenchConfig.model_fields} | {"run.name"}
    for rule in RULES:
        if rule.id.startswith("launcher-"):  # other pipelines have other flags
            continue
        told = f"{rule.cause} {rule.fix}"
        named = set(re.findall(r"--([a-z_]+)\b(?!-)", told)) - OTHERS_FLAGS
        assert named <= flags, rule.id
        named = set(re.findall(r"\b((?:run|synth|dump|train|bench)\.[a-z_]+)\b", told))
        assert named <= keys, rule.id


@pytest.mark.parametrize(
    "rule_id", ["compiler-missing", "kernel-shared-memory", "engine-compile-failed"]
)
def test_a_kernel_of_train_s_is_no_engine_s(rule_id: str) -> None:
    """Only train's can be left out by a variable, and train has no engine to start eagerly."""
    (rule,) = (rule for rule in RULES if rule.id == rule_id)
    told = {stage: render(rule.fix, Case("logs", None, []), stage) for stage in ("train", "synth")}
    assert "EYRIE_TRAIN_KERNELS=torch" in told["train"] and "eager" not in told["train"]
    assert "attention-backend" not in told["train"]
    assert "EYRIE_TRAIN_KERNELS" not in told["synth"]


@pytest.mark.parametrize("rule", RULES, ids=[rule.id for rule in RULES])
def test_a_rule_reads_well_even_where_it_caught_nothing(rule: Rule) -> None:
    for stage in ("synth", "dump", "train", "bench", None):
        for text in (rule.cause, rule.fix):
            text = render(text, Case("logs", None, []), stage)
            assert not any(odd in text for odd in ("built-in", "None", "{{", "{%", "  ", "(now"))
