# SPDX-License-Identifier: Apache-2.0
"""validate of a ModelOpt launcher's experiment: told from its logs, and UNKNOWN where they are silent.

The lines are quoted from the launcher's scripts (common/vllm/query.sh, common/query.py,
compute_hidden_states_hf.py, the Hugging Face trainer, export_hf_checkpoint.py, specdec_bench) and from
the success markers on NVIDIA's page about validation.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from shared.paths import STAGES
from shared.settings import build
from stages.ops.config import ValidateConfig
from stages.ops.look.validate.findings import FAIL, PASS, UNKNOWN, Findings
from stages.ops.look.validate.launcher import validate_experiment
from stages.ops.look.validate.run import run

LEAST = 2.1
SYNTH = """\
Waiting for server to start...
Server not ready yet (120/600s), retrying in 10 seconds...
Server is up! (waited 130s)
Running: python3 common/query.py http://localhost:8000/v1 /hf-local/Qwen/Qwen3-8B --save /scratchspace/data
625 /scratchspace/data/train-00001-00016.jsonl
Map (num_proc=32): 100%|##########| 625/625 [01:13<00:00,  8.50 examples/s]
612 /scratchspace/data/train-00002-00016.jsonl
Main process exit
"""
DUMP = """\
Loaded 1237 conversations from /scratchspace/data
Removed 0 conversations due to existing output files
Skipped 37 conversations due to length constraints.
Successfully processed 600 out of 618 conversations.
Successfully processed 600 out of 619 conversations.
"""
TRAIN = """\
{'loss': 9.548, 'grad_norm': 1.5, 'learning_rate': 1e-06, 'epoch': 0.01}
{'loss': '7.31', 'grad_norm': '1.2', 'learning_rate': '1e-05', 'epoch': '0.25'}
{'loss': 4.02, 'grad_norm': 1.0, 'learning_rate': 1e-04, 'epoch': 0.5}
{'loss': 3.38, 'grad_norm': 0.9, 'learning_rate': 1e-04, 'epoch': 1.0}
{'train_runtime': 1234.5, 'train_samples_per_second': 1.0, 'train_loss': 6.06, 'epoch': 1.0}
Exported checkpoint to /scratchspace/export
"""
BENCH = """\
coding Average AL: 2.91
writing Average AL: 1.95
Average AL: 2.4375
Acceptance Length Histogram
"""
WHOLE = dict(zip(STAGES, (SYNTH, DUMP, TRAIN, BENCH), strict=True))


def lay_out(folder: Path, logs: Mapping[str, str]) -> Path:
    for task, stage in enumerate(STAGES):
        (folder / f"task_{task}").mkdir(parents=True)
        if stage in logs:
            (folder / f"task_{task}" / f"sbatch_41{task}.out").write_text(logs[stage])
    return folder


def verdicts(found: Findings) -> dict[str, str]:
    return {f"{row.artifact[:6]} {row.question}": row.verdict for row in found.rows}


def asked(folder: Path, changes: Mapping[str, str]) -> Findings:
    return validate_experiment(lay_out(folder, WHOLE | dict(changes)), STAGES, LEAST)


def test_an_experiment_that_went_well_passes(tmp_path: Path) -> None:
    found = asked(tmp_path, {})
    assert set(verdicts(found).values()) == {PASS}, found.rows
    assert found.verdict == PASS
    told = {f"{row.artifact[:6]} {row.question}": row.detail for row in found.rows}
    assert told["task_0 rows"].startswith("1,237 prompts in 2 shards")
    assert told["task_1 states"] == "1,200 conversations"
    assert told["task_2 loss"] == "9.5480 in the first quarter, 3.3800 in the last"
    assert told["task_3 acceptance length"] == "2.438, at least 2.1 was required"


def test_the_markers_of_nvidias_page_count_too(tmp_path: Path) -> None:
    marked = {
        "synth": "Saved 5000 samples\nexit code: 0\n",
        "dump": "Successfully processed 5000 conversations\n",
        "train": TRAIN.replace("Exported checkpoint to /scratchspace/export", "export complete"),
        "bench": "Average Acceptance Length {'accept': 5120, 'count': 2048, 'ratio': 2.50}\n",
    }
    assert asked(tmp_path, marked).verdict == PASS


@pytest.mark.parametrize(
    "silent", ["", "Server not ready yet (10/600s), retrying in 10 seconds...\n"]
)
def test_what_no_line_says_is_never_a_pass(tmp_path: Path, silent: str) -> None:
    found = asked(tmp_path, dict.fromkeys(STAGES, silent))
    assert set(verdicts(found).values()) == {UNKNOWN}
    assert found.verdict == UNKNOWN
    assert found.summary() == "UNKNOWN: 0 passed, 0 failed, 9 unknown"


def test_a_task_without_a_log_is_unknown(tmp_path: Path) -> None:
    logs = {stage: text for stage, text in WHOLE.items() if stage != "bench"}
    found = validate_experiment(lay_out(tmp_path, logs), STAGES, LEAST)
    assert verdicts(found)["task_3 outcome"] == UNKNOWN
    assert verdicts(found)["task_2 outcome"] == PASS


FAILURES = {
    "a server out of memory": (
        "synth",
        SYNTH.replace("625 /s", "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.\n625 /s"),
        "task_0 outcome",
        "sbatch_410.out:5",
    ),
    "a server that went away": (
        "synth",
        SYNTH + "Terminate earlier due to server connection error!\n",
        "task_0 rows",
        "went away",
    ),
    "no sample": ("synth", "Saved 0 samples\n", "task_0 rows", "no sample"),
    "another exit code": ("synth", SYNTH + "exit code: 1\n", "task_0 outcome", "exit code: 1"),
    "no conversation": (
        "dump",
        "Prepared 0 prompts (1237 skipped too long, 0 invalid)\nNo prompts to process.\n",
        "task_1 states",
        "no conversation was written",
    ),
    "a time limit": (
        "dump",
        "slurmstepd: error: *** STEP 41.0 ON n1 CANCELLED AT 2026-11-20T03:00:00 DUE TO TIME LIMIT ***\n",
        "task_1 outcome",
        "sbatch_411.out:1",
    ),
    "a loss that is no number": (
        "train",
        TRAIN.replace("3.38", "nan"),
        "task_2 loss",
        "the loss is nan",
    ),
    "a loss that rises": (
        "train",
        TRAIN.replace("9.548", "1.5"),
        "task_2 loss",
        "the loss does not fall",
    ),
    "an export of nothing": (
        "train",
        "FileNotFoundError: [Errno 2] No such file or directory: '/scratchspace/offline_hidden_states'\n"
        + TRAIN,
        "task_2 outcome",
        "sbatch_412.out:1",
    ),
    "too short an acceptance length": (
        "bench",
        BENCH.replace("2.4375", "2.05"),
        "task_3 acceptance length",
        "2.050, expected at least 2.1",
    ),
    "a report of failure": (
        "bench",
        BENCH + "<REPORT>FAIL: specdec_bench: run.py exited non-zero</REPORT>\n",
        "task_3 outcome",
        "<REPORT>FAIL",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_named(tmp_path: Path, name: str) -> None:
    stage, log, question, cause = FAILURES[name]
    found = asked(tmp_path, {stage: log})
    failed = {
        f"{row.artifact[:6]} {row.question}": row.detail
        for row in found.rows
        if row.verdict == FAIL
    }
    assert question in failed, found.rows
    assert cause in failed[question]
    assert all(name.startswith(question[:6]) for name in failed), failed  # no other task is blamed


def test_states_that_were_there_already_are_not_called_written(tmp_path: Path) -> None:
    kept = "Removed 1200 conversations due to existing output files\nNo prompts to process.\n"
    assert verdicts(asked(tmp_path, {"dump": kept}))["task_1 states"] == UNKNOWN


def test_the_command_tells_an_experiment_from_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lay_out(tmp_path / "cicd_77", WHOLE)
    out = tmp_path / "page.md"
    flags = {"name": str(folder), "json": "true", "out": str(out)}
    assert run(build(ValidateConfig, flags)) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == PASS
    assert "| task_3 (bench) | acceptance length | PASS |" in out.read_text()
    strict = build(ValidateConfig, flags | {"min_acceptance_length": "2.5", "only": "bench"})
    assert run(strict) == 3
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {row["artifact"] for row in found} == {"task_3 (bench)"}
