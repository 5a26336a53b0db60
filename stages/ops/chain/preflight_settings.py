# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about single settings: what they name is there, and an engine takes it.

Each is what a stage would refuse by its own check, hours later. vLLM's own options are held to its source,
since importing it takes longer than a person waits for a plan.
"""

import functools
import json
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.borrowed import require_lender
from shared.artifacts.manifest import MANIFEST
from shared.contracts.bench_report import read_report
from shared.contracts.head_folder import draft_token_ids, read_head, require_fc, require_mask
from shared.errors import UserError, nearest
from shared.paths import RunPaths, find_input, require_input
from shared.target.hub import require_id
from shared.target.model import TargetConfig
from shared.vllm.measured_rows import needed_model_len
from stages.ops.chain import vllm_options
from stages.ops.chain.processes import Step, environment, python_of, uses_vllm
from stages.ops.chain.served import problem

# A training holds out one of its rows.
_LEAST_ROWS = 2


def setting_problems(left: Sequence[Step], paths: RunPaths) -> Iterator[str]:
    """What the stages that are left name and is not there."""
    by_stage = {step.stage: step for step in left}
    if bench := by_stage.get("bench"):
        yield from _said(lambda: _require_report(bench, paths.workspace))
        yield from _said(lambda: _require_head(bench, paths, is_made="train" in by_stage))
    train, synth = by_stage.get("train"), by_stage.get("synth")
    if train and train.settings["dump_of"] is not None:
        yield from _borrowing(train.settings["dump_of"], by_stage, paths)
    elif train and synth and (synth.settings["max_samples"] or _LEAST_ROWS) < _LEAST_ROWS:
        yield problem(
            "synth.max_samples",
            f"at least {_LEAST_ROWS} rows, of which train holds one out",
            str(synth.settings["max_samples"]),
            "Raise it, or leave train out (--skip train,bench).",
        )


def _said(check: Callable[[], object]) -> Iterator[str]:
    """The refusal of a check, if it refuses."""
    try:
        check()
    except UserError as error:
        yield str(error)


def _require_report(bench: Step, workspace: Path) -> None:
    if (earlier := bench.settings["earlier_report"]) is not None:
        read_report(require_input(earlier, workspace, label="bench.earlier_report"))


def _require_head(bench: Step, paths: RunPaths, *, is_made: bool) -> None:
    """Refuse a head that is not there; one on the hub is bench's to find.

    Args:
        is_made: whether this chain makes the run's export.
    """
    name = bench.settings["head"]
    if name is None:
        return
    folder = find_input(name, paths.workspace)
    if folder is not None:
        head = read_head(folder)
        require_fc(head)
        require_mask(head)
        return
    own = paths.export.absolute()
    if not (is_made and own in ((paths.workspace / name).absolute(), Path(name).absolute())):
        require_id(name, paths.workspace, label="bench.head")


def head_problems(bench: Step, config: TargetConfig, workspace: Path) -> Iterator[str]:
    """Why a head in a folder is not one of this target."""
    name = bench.settings["head"]
    folder = find_input(name, workspace) if name is not None else None
    if folder is None:
        return
    try:
        head = read_head(folder)
    except UserError:  # `setting_problems` says it
        return
    found = (head.config["vocab_size"], head.target_hidden_size)
    expected = (config.vocab_size, config.hidden_size)
    if found == expected:
        yield from _said(lambda: draft_token_ids(head, config.vocab_size))
        return
    yield problem(
        f"bench.head {folder}",
        f"a head for {config.folder} (vocabulary, hidden size {expected})",
        str(found),
        "Measure it with its own target.",
    )


def room_problems(bench: Step, config: TargetConfig) -> Iterator[str]:
    """Why not even a prompt of one token has room in the target: bench's own rule."""
    positions = config.raw.get("max_position_embeddings")
    if bench.settings["endpoint"] or not isinstance(positions, int):
        return
    answer, depth = (max(bench.settings[key]) for key in ("max_tokens", "num_speculative_tokens"))
    needed = needed_model_len(1, max_tokens=answer, num_speculative_tokens=depth)
    if needed > positions:
        yield problem(
            "bench.max_tokens and num_speculative_tokens",
            f"room for a prompt, {answer} tokens and 3 x {depth} drafted ones in the target's "
            f"{positions} positions",
            f"at least {needed}",
            "Lower max_tokens or num_speculative_tokens.",
        )


def _borrowing(owner: str, left: Mapping[str, Step], paths: RunPaths) -> Iterator[str]:
    if made := [stage for stage in ("synth", "dump") if stage in left]:
        yield problem(
            "train.dump_of",
            f"no stage before train in this command, since the dump is run {owner}'s",
            " and ".join(made),
            f"Add --skip {','.join(made)}, or leave dump_of out.",
        )
    refused = list(_said(lambda: require_lender(paths, owner)))
    yield from refused
    dump = RunPaths(paths.workspace, owner).stage("dump")
    if not refused and not (dump / MANIFEST).exists():
        yield problem(
            "train.dump_of", f"a finished dump in {dump}", f"no {MANIFEST}", "Finish it first."
        )


def option_problems(step: Step) -> Iterator[str]:
    """The options of an engine that the stage's vLLM does not have."""
    if not uses_vllm(step):
        return
    known = _known(python_of(step.stage))
    if step.stage == "synth":
        yield from _unknown("synth.server_args", step, known.get("server"))
        return
    yield from _unknown(f"{step.stage}.engine_args", step, known.get("engine"))
    if step.stage != "bench":
        return
    yield from _unknown("bench.speculative_args", step, known.get("speculative"))
    longest, drafted = known.get("longest_draft"), max(step.settings["num_speculative_tokens"])
    if longest is not None and drafted > longest:
        yield problem(
            "bench.num_speculative_tokens",
            f"at most {longest}, which is what vLLM verifies at once",
            str(drafted),
            "Lower it; beyond the depth that the head was trained for, more seldom pays.",
        )


def _unknown(label: str, step: Step, known: Collection[str] | None) -> Iterator[str]:
    """Names that vLLM does not take, where its own are known; a server takes their beginnings too."""
    if known is None:
        return
    key = label.partition(".")[2]
    beginnings = key == "server_args"
    for given in step.settings[key]:
        name = given.replace("-", "_")
        plain = name.removeprefix("no_") if beginnings else name
        if plain in known or (beginnings and any(each.startswith(plain) for each in known)):
            continue
        hint = nearest(plain, known)
        yield problem(
            label,
            f"options of the vLLM of {python_of(step.stage)}",
            given,
            hint if hint.startswith("Did") else "Remove it.",
        )


@functools.lru_cache
def _known(python: str) -> dict[str, Any]:
    """As `vllm_options.read`, of an interpreter's vLLM; empty where there is none."""
    command = [python, "-P", vllm_options.__file__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env=environment()
        )
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):  # `_versions` tells it
        return {}
