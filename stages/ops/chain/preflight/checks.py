# SPDX-License-Identifier: Apache-2.0
"""Would this chain fail for a reason that can be seen now?

In: what the stages say that they will do, and this machine. Out: one line a problem: what was
expected, what was found, what to do. Costs a second or two: no engine, no weights are loaded.
What only the work itself can tell (the exact size of the states, whether vLLM has hooks for the
target) stays with the stages.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.config import RunConfig
from shared.conversations.switches import require_reasoning_end, require_switches
from shared.errors import UserError
from shared.paths import RunPaths, find_input
from shared.target.tokenizer import load_tokenizer
from shared.vllm.http import Address
from shared.vllm.server import is_healthy
from stages.ops.chain import containers, pair
from stages.ops.chain.inputs import targets
from stages.ops.chain.machine import SHARED_MEMORY, Machine
from stages.ops.chain.preflight.held_out import seen_prompts
from stages.ops.chain.preflight.packages import compiler_problems, package_problems, packages_of
from stages.ops.chain.preflight.rows import input_problems
from stages.ops.chain.preflight.settings import option_problems, setting_problems
from stages.ops.chain.preflight.target import existing_folder, target_problems
from stages.ops.chain.preflight.variant import served_variant_problems
from stages.ops.chain.processes import Step, uses_vllm
from stages.ops.chain.rows import Looks
from stages.ops.chain.served import problem

# Below this vLLM ends with "Insufficient space in /dev/shm"; Docker's default is 64 MiB.
_SHARED_BYTES = 160 << 20


def problems(steps: Sequence[Step], paths: RunPaths, machine: Machine, looks: Looks) -> list[str]:
    """Everything that stands in the way, the stages that are done left out."""
    left = [step for step in steps if not step.done]
    found = [*_workspace(paths), *_artifacts(steps), *setting_problems(left, paths)]
    for step in left:
        found += package_problems(step, machine)
        found += option_problems(step)
        found += input_problems(step, looks, paths.workspace)
        found += _endpoints(step)
        found += _reasoning(step, paths.workspace)
    found += compiler_problems(left, machine)
    found += _shared_memory(left, machine)
    found += pair.problems(steps, machine, is_local=True)
    found += served_variant_problems(steps, paths, packages_of)
    for name in dict.fromkeys(name for step in left for name in targets(step)):
        found += target_problems(name, left, paths, machine, packages_of)
    return list(dict.fromkeys(found))


def problems_of_containers(
    steps: Sequence[Step], paths: RunPaths, machine: Machine, looks: Looks
) -> list[str]:
    """As `problems`, but for what only an image can tell: packages, its network, its cache."""
    left = [step for step in steps if not step.done]
    # The recipe is kept in the workspace, from here.
    found = [*containers.problems(paths), *_workspace(paths), *_artifacts(steps)]
    found += setting_problems(left, paths)
    found += pair.problems(steps, machine, is_local=False)
    for step in left:
        found += input_problems(step, looks, paths.workspace)
        found += _reasoning(step, paths.workspace)
    for name in dict.fromkeys(name for step in left for name in targets(step)):
        if find_input(name, paths.workspace) is not None:
            found += target_problems(name, left, paths, machine, lambda _: {})
    return list(dict.fromkeys(found))


def warnings(steps: Sequence[Step]) -> Iterator[str]:
    """What will not fail, and is hardly what was meant."""
    by_stage = {step.stage: step for step in steps}
    train, bench = by_stage.get("train"), by_stage.get("bench")
    if not train or not bench or bench.done:
        return
    if bench.settings["head"] or bench.settings["endpoint"]:
        return
    yield from seen_prompts(steps)
    trained = train.settings["ttt_steps"]
    drafted = max(bench.settings["num_speculative_tokens"])
    if drafted > trained:
        yield (
            f"bench.num_speculative_tokens: {drafted} drafts further than train.ttt_steps: {trained} "
            f"trains. Expect the later tokens to be accepted seldom, or set ttt_steps: {drafted}."
        )


def _artifacts(steps: Sequence[Step]) -> Iterator[str]:
    return (f"{step.stage}: {step.refusal}" for step in steps if step.refusal)


def _workspace(paths: RunPaths) -> Iterator[str]:
    folder = existing_folder(paths)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield problem(
            "workspace",
            f"a folder that can be written at {folder}",
            str(error.strerror),
            "Make it writable for this user, or give another --workspace.",
        )


def _reasoning(step: Step, workspace: Path) -> Iterator[str]:
    """What the target's template or tokenizer does not follow of the run's settings."""
    renders = step.stage in ("synth", "bench") or step.settings.get("conversations")
    folder = find_input(step.target, workspace)
    if folder is None or not renders or step.settings.get("endpoint"):
        return
    run = RunConfig.model_validate(step.run)
    try:
        require_switches(folder, run, workspace)
        answers = step.stage == "synth" and step.settings["mode"] != "keep"
        if answers and run.reasoning == "drop":
            tokenizer = load_tokenizer(folder, trust_remote_code=run.trust_remote_code)
            require_reasoning_end(tokenizer, step.settings["reasoning_end"], folder)
    except UserError as error:
        yield str(error)


def _endpoints(step: Step) -> Iterator[str]:
    names = ("endpoint", "baseline_endpoint")
    for url in [*step.settings.get("endpoints", ()), *map(step.settings.get, names)]:
        if url and not is_healthy(Address(url).base_url):
            yield problem(
                f"{step.stage}'s endpoint",
                f"a server at {url}",
                "no answer to /health",
                "Start it, or take it out of the recipe.",
            )


def _shared_memory(left: Sequence[Step], machine: Machine) -> Iterator[str]:
    if any(map(uses_vllm, left)) and machine.shared_bytes < _SHARED_BYTES:
        yield problem(
            str(SHARED_MEMORY),
            f"{_SHARED_BYTES >> 20} MiB free for vLLM",
            f"{machine.shared_bytes >> 20} MiB",
            "Give the container more (--shm-size 1g, shm_size in compose).",
        )
