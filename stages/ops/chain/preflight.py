# SPDX-License-Identifier: Apache-2.0
"""Would this chain fail for a reason that can be seen now?

In: what the stages say that they will do, and this machine. Out: one line a problem: what was
expected, what was found, what to do. Costs a second or two: no engine, no weights are loaded.
What only the work itself can tell (the exact size of the states, whether vLLM has hooks for the
target) stays with the stages.
"""

import functools
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared.config import RunConfig
from shared.conversations.switches import require_reasoning_end, require_switches
from shared.errors import UserError
from shared.paths import RunPaths, find_input
from shared.runtime import compiler
from shared.runtime.wording import counted
from shared.target.tokenizer import load_tokenizer
from shared.vllm.http import Address
from shared.vllm.server import is_healthy
from shared.vllm.versions import SUPPORTED_TENSORRT_LLM, SUPPORTED_VLLM, is_within
from stages.ops.chain import containers, pair
from stages.ops.chain.held_out import seen_prompts
from stages.ops.chain.machine import SHARED_MEMORY, Machine
from stages.ops.chain.preflight_rows import input_problems
from stages.ops.chain.preflight_settings import option_problems, setting_problems
from stages.ops.chain.preflight_target import existing_folder, target_problems, targets
from stages.ops.chain.preflight_variant import served_variant_problems
from stages.ops.chain.processes import Step, environment, python_of, uses_vllm
from stages.ops.chain.served import VLLM_NAMES, problem

# Below this vLLM ends with "Insufficient space in /dev/shm"; Docker's default is 64 MiB.
_SHARED_BYTES = 160 << 20
# The same engine under two names.
_NAMES = {"vllm": VLLM_NAMES, "tensorrt-llm": ("tensorrt-llm", "tensorrt_llm")}
# Distribution -> what a stage of this version needs; as in pyproject.toml.
_FLOORS = {
    "synth": {"vllm": ">=0.28", "pyarrow": ">=20"},
    "dump": {
        "vllm": SUPPORTED_VLLM,
        "tensorrt-llm": SUPPORTED_TENSORRT_LLM,
        "pyarrow": ">=20",
        "torch": ">=2",
    },
    "train": {"torch": ">=2", "accelerate": ">=1.10", "safetensors": ">=0.5"},
    "bench": {"vllm": ">=0.28", "matplotlib": ">=3.9"},
}
# Of train.trackers -> the distributions with which accelerate takes it for installed.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardx"), "mlflow": ("mlflow", "mlflow-skinny")}
_LIST_VERSIONS = (
    "import importlib.metadata as m, json\n"
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


def problems(steps: Sequence[Step], paths: RunPaths, machine: Machine) -> list[str]:
    """Everything that stands in the way, the stages that are done left out."""
    left = [step for step in steps if not step.done]
    found = [*_workspace(paths), *_artifacts(steps), *setting_problems(left, paths)]
    for step in left:
        found += _versions(step, machine)
        found += option_problems(step)
        found += input_problems(step, paths.workspace)
        found += _endpoints(step)
        found += _reasoning(step, paths.workspace)
    found += _compiler(left, machine)
    found += _shared_memory(left, machine)
    found += pair.problems(steps, machine, is_local=True)
    found += served_variant_problems(steps, paths, _packages)
    for name in dict.fromkeys(name for step in left for name in targets(step)):
        found += target_problems(name, left, paths, machine, _packages)
    return list(dict.fromkeys(found))


def problems_of_containers(steps: Sequence[Step], paths: RunPaths, machine: Machine) -> list[str]:
    """As `problems`, but for what only an image can tell: packages, its network, its cache."""
    left = [step for step in steps if not step.done]
    # The recipe is kept in the workspace, from here.
    found = [*containers.problems(paths), *_workspace(paths), *_artifacts(steps)]
    found += setting_problems(left, paths)
    found += pair.problems(steps, machine, is_local=False)
    for step in left:
        found += input_problems(step, paths.workspace)
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


def _packages(stage: str) -> dict[str, str]:
    """Distribution -> version, of a stage's interpreter; none where there is no such interpreter."""
    try:
        return _installed(python_of(stage))
    except (OSError, subprocess.SubprocessError):  # `_versions` tells it
        return {}


def _uses_trtllm(step: Step) -> bool:
    """Whether a stage starts TensorRT-LLM on this machine."""
    return step.settings.get("backend") == "trtllm" and not step.settings.get("states")


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


@functools.lru_cache
def _include_folder(python: str) -> Path:
    """Where an interpreter's headers belong.

    Raises:
        OSError, subprocess.SubprocessError: it is none.
    """
    command = [python, "-I", compiler.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Path(done.stdout.strip())


@functools.lru_cache
def _installed(python: str) -> dict[str, str]:
    """Distribution -> version, of an interpreter.

    Raises:
        OSError, subprocess.SubprocessError: it is none.
    """
    done = subprocess.run(
        [python, "-c", _LIST_VERSIONS],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    return dict(json.loads(done.stdout))


def _versions(step: Step, machine: Machine) -> Iterator[str]:
    python = python_of(step.stage)
    try:
        installed = _installed(python)
    except (OSError, subprocess.SubprocessError) as error:
        expected = f"a Python interpreter at {python}"
        yield problem(
            step.stage, expected, str(error), f"Set EYRIE_{step.stage.upper()}_PYTHON to one."
        )
        return
    for name, floor in _FLOORS[step.stage].items():
        if name == "vllm" and not uses_vllm(step):
            continue
        if name == "tensorrt-llm" and not _uses_trtllm(step):
            continue
        names = _NAMES.get(name, (name,))
        version = next((installed[each] for each in names if each in installed), None)
        if version is None or not is_within(version, floor):
            yield problem(
                f"{step.stage}'s packages",
                f"{name} {floor}",
                version or "none",
                f"Install it for {python}, or name another interpreter in "
                f"EYRIE_{step.stage.upper()}_PYTHON.",
            )
    yield from _trackers(step, installed)
    computes = step.stage in ("dump", "train") or uses_vllm(step)
    torch = installed.get("torch", "")
    if machine.gpus and computes and torch.endswith("+cpu"):
        yield problem(
            f"{step.stage}'s packages",
            f"torch for CUDA beside {counted(len(machine.gpus), 'GPU')}",
            torch,
            "Run `make clean setup FLAVOUR=gpu`, or set CUDA_VISIBLE_DEVICES= to use the processor.",
        )


def _trackers(step: Step, installed: Mapping[str, str]) -> Iterator[str]:
    """Trackers that train would refuse: accelerate looks for the packages beside it."""
    known = {name.lower() for name in installed}
    asked = step.settings.get("trackers", ())
    if missing := [name for name in asked if known.isdisjoint(_TRACKERS.get(name, (name,)))]:
        names = ", ".join(missing)
        yield problem(
            "train.trackers",
            f"trackers that are installed for {python_of(step.stage)}",
            f"no {names}",
            f"Leave {names} out, or install it there.",
        )


def _compiler(left: Sequence[Step], machine: Machine) -> Iterator[str]:
    """Kernels are compiled where they run: by vLLM and by train, on a GPU."""
    if not machine.gpus:
        return
    compiling = [step.stage for step in left if step.stage == "train" or uses_vllm(step)]
    for python in dict.fromkeys(map(python_of, compiling)):
        try:
            missing = compiler.lacking(_include_folder(python))
        except (OSError, subprocess.SubprocessError):  # `_versions` tells it
            continue
        if missing:
            stages = " and ".join(stage for stage in compiling if python_of(stage) == python)
            expected = "a C compiler and Python's headers, to compile kernels for the GPU"
            yield problem(stages, expected, missing, f"{compiler.REMEDY}.")


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
