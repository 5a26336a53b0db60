# SPDX-License-Identifier: Apache-2.0
"""Did a ModelOpt launcher's experiment go well, as far as its logs say?

In: an experiment folder (`task_0` to `task_3`, in them `sbatch_*.out` or `*.log`). Out: PASS, FAIL or
UNKNOWN a question. The artifacts lie on the cluster's /scratchspace and are out of sight, so what no
line of a log says is UNKNOWN and never PASS. Costs reading the logs twice, the
begin and the end of those over 4 MiB.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.paths import STAGES
from shared.runtime.wording import counted
from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.diagnosis import Outcome, diagnose
from stages.ops.look.triage.failure_rules import read_rules
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.text import shown
from stages.ops.look.validate.findings import Findings, Unknown, Wrong, ask_falling

# What the pipeline's scripts print: common/vllm/query.sh and query.py, compute_hidden_states_*.py, the
# Hugging Face trainer, export_hf_checkpoint.py, specdec_bench; and the markers that NVIDIA's own
# validation page names. `srun --label` puts the rank before a line.
_REPORTED = {
    name: re.compile(pattern)
    for name, pattern in {
        "exit": r"[Ee]xit code: ?(\d+)",
        "report": r"<REPORT>(PASS|FAIL)\b",
        "main_exit": r"(Main process exit)",
        "saved": r"Saved (\d+) samples",
        "no_server": r"(Terminate earlier due to server connection error)",
        "dumped": r"Successfully processed (?:all )?(\d+)(?: out of \d+)? conversations",
        "kept": r"Removed (\d+) conversations due to existing",
        "no_prompts": r"(No prompts to process)",
        "loss": r"'loss': '?(nan|-?inf|[-+.\de]+)",
        "exported": r"(Exported checkpoint to|export complete)",
        "ratio": r"Average Acceptance Length \{[^}\n]*'ratio': ?([.\d]+)",
        # From the line's begin: the figures of a shard or a category end in the same words.
        "shard": r"(?m)^(?:\d+: ?)?(\d+) \S+/train-\d+-\d+\.jsonl\s*$",
        "average": r"(?m)^(?:\d+: ?)?Average AL: ([.\d]+)",
    }.items()
}
_ENDS = {
    "synth": ("main_exit", "saved"),
    "dump": ("dumped", "no_prompts"),
    "train": ("exported",),
    "bench": ("average", "ratio"),
}

Reported = dict[str, list[str]]


def is_experiment(folder: Path) -> bool:
    """Whether a folder is a launcher's, rather than a run's."""
    return any(folder.glob("task_[0-3]*"))


def validate_experiment(folder: Path, stages: Sequence[str], min_length: float) -> Findings:
    """All questions about the tasks of these stages.

    Args:
        min_length: the acceptance length that the benchmark must have reached.

    Raises:
        UserError: there is no log in the folder.
    """
    case = open_case([folder], recipe=None, workspace=folder.parent, exit_codes={})
    outcome = diagnose(case, read_rules())
    findings = Findings()
    for stage in stages:
        logs = [log.path for log in case.logs if log.stage == stage]
        reported = _read(logs)
        questions: dict[str, Callable[[], str]] = {
            "outcome": functools.partial(_ask_outcome, stage, reported, outcome, logs),
            **_of_stage(stage, reported, min_length),
        }
        for question, answer in questions.items():
            findings.ask(f"task_{STAGES.index(stage)} ({stage})", question, answer)
    return findings


def _of_stage(stage: str, reported: Reported, min_length: float) -> dict[str, Callable[[], str]]:
    if stage == "synth":
        return {"rows": functools.partial(_ask_rows, reported)}
    if stage == "dump":
        return {"states": functools.partial(_ask_states, reported)}
    if stage == "train":
        return {
            "loss": functools.partial(_ask_loss, reported),
            "export": functools.partial(_ask_export, reported),
        }
    return {"acceptance length": functools.partial(_ask_length, reported, min_length)}


def _read(logs: Sequence[Path]) -> Reported:
    """What each of the patterns caught, in the logs' order."""
    reported: Reported = {name: [] for name in _REPORTED}
    for path in logs:
        text = "\n".join(line for _, line in read_last_attempt(path).lines)
        for name, pattern in _REPORTED.items():
            reported[name] += [found[1] for found in pattern.finditer(text)]
    return reported


def _ask_outcome(stage: str, reported: Reported, outcome: Outcome, logs: Sequence[Path]) -> str:
    """No failure in the log, and a line that stands at a task's end alone."""
    if found := outcome.of(stage):
        where = f" ({shown(found[0].evidence)})" if found[0].evidence else ""
        raise Wrong(f"{found[0].cause}{where}")
    if "FAIL" in reported["report"]:
        raise Wrong("the task reports FAIL")
    code = reported["exit"][-1] if reported["exit"] else ""
    if code not in ("", "0", "143"):  # 143: a server that was stopped when its work was done
        raise Wrong(f"the task reports exit code {code}")
    if not logs:
        raise Unknown("no log of this task")
    if code == "0" or "PASS" in reported["report"] or any(reported[name] for name in _ENDS[stage]):
        return f"ended, no failure in {counted(len(logs), 'log')}"
    raise Unknown("no failure in its log, and nothing that says that it ended")


def _ask_rows(reported: Reported) -> str:
    """Prompts that were answered."""
    if reported["no_server"]:
        raise Wrong("the server went away before all prompts were answered")
    saved, begun = _sum(reported["saved"]), _sum(reported["shard"])
    if reported["saved"] and saved == 0:
        raise Wrong("no sample was saved")
    if saved:
        return f"{counted(saved, 'sample')} saved"
    if begun and reported["main_exit"]:
        shards = counted(len(reported["shard"]), "shard")
        return f"{counted(begun, 'prompt')} in {shards}, each answered before the next"
    raise Unknown("its log reports no number of samples")


def _ask_states(reported: Reported) -> str:
    """Conversations whose hidden states were written."""
    dumped, kept = _sum(reported["dumped"]), _sum(reported["kept"])
    if dumped:
        return counted(dumped, "conversation") + (f", {kept} were there already" if kept else "")
    if kept:
        raise Unknown(f"none written now; already there: {counted(kept, 'conversation')}")
    if reported["dumped"] or reported["no_prompts"]:
        raise Wrong("no conversation was written: all too long, too short or not valid")
    raise Unknown("its log reports no number of conversations")


def _ask_loss(reported: Reported) -> str:
    """Every loss is a number, and the last ones are below the first ones."""
    losses = [float(text) for text in reported["loss"]]
    if not losses:
        raise Unknown("its log reports no loss")
    if not all(map(math.isfinite, losses)):
        raise Wrong(f"the loss is {next(x for x in losses if not math.isfinite(x))}")
    return ask_falling(losses)


def _ask_export(reported: Reported) -> str:
    """The head was exported."""
    if not reported["exported"]:
        raise Unknown("its log reports no export")
    return "exported"


def _ask_length(reported: Reported, minimum: float) -> str:
    """The acceptance length that the benchmark's log reports last, over all prompts."""
    lengths = [float(text) for text in (*reported["ratio"], *reported["average"])]
    if not lengths:
        raise Unknown("its log reports no acceptance length")
    if lengths[-1] < minimum:
        raise Wrong(f"acceptance length {lengths[-1]:.3f}, expected at least {minimum:g}")
    return f"{lengths[-1]:.3f}, at least {minimum:g} was required"


def _sum(texts: Sequence[str]) -> int:
    return sum(map(int, texts))
