# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about single settings: what they name is there, and an engine takes it.

Each is what a stage would refuse by its own check, hours later. vLLM's own options are held to its source,
since importing it takes longer than a person waits for a plan.
"""

import functools
import json
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from shared.artifacts.borrowed import require_lender
from shared.artifacts.manifest import MANIFEST
from shared.errors import nearest
from shared.paths import RunPaths
from shared.vllm.own_options import field_name
from stages.ops.chain.preflight import vllm_options
from stages.ops.chain.preflight.bench import bench_problems
from stages.ops.chain.processes import Step, environment, python_of, uses_vllm
from stages.ops.chain.served import problem, said


def setting_problems(left: Sequence[Step], paths: RunPaths) -> Iterator[str]:
    """What the stages that are left name and is not there."""
    by_stage = {step.stage: step for step in left}
    if bench := by_stage.get("bench"):
        yield from bench_problems(bench, paths, is_made="train" in by_stage)
    train = by_stage.get("train")
    if train and train.settings["dump_of"] is not None:
        yield from _borrowing(train.settings["dump_of"], by_stage, paths)


def _borrowing(owner: str, left: Mapping[str, Step], paths: RunPaths) -> Iterator[str]:
    if made := [stage for stage in ("synth", "dump") if stage in left]:
        yield problem(
            "train.dump_of",
            f"no stage before train in this command, since the dump is run {owner}'s",
            " and ".join(made),
            f"Add --skip {','.join(made)}, or leave dump_of out.",
        )
    refused = list(said(lambda: require_lender(paths, owner)))
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
        name = field_name(given)
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
    except (OSError, subprocess.SubprocessError, ValueError):  # `package_problems` tells it
        return {}
