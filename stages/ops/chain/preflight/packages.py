# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about the packages and headers of each stage's interpreter."""

import functools
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared.runtime import compiler
from shared.runtime.wording import counted
from shared.vllm.versions import SUPPORTED_TENSORRT_LLM, SUPPORTED_VLLM, is_within
from stages.ops.chain.machine import Machine
from stages.ops.chain.processes import Step, environment, python_of, uses_vllm
from stages.ops.chain.served import VLLM_NAMES, problem

# The same engine under two names.
_NAMES = {"vllm": VLLM_NAMES, "tensorrt-llm": ("tensorrt-llm", "tensorrt_llm")}
# Distribution -> what a stage of this version needs; as in pyproject.toml.
FLOORS = {
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


def packages_of(stage: str) -> dict[str, str]:
    """Distribution -> version, of a stage's interpreter; none where there is no such interpreter."""
    try:
        return installed(python_of(stage))
    except (OSError, subprocess.SubprocessError):  # `package_problems` tells it
        return {}


def _uses_trtllm(step: Step) -> bool:
    """Whether a stage starts TensorRT-LLM on this machine."""
    return step.settings.get("backend") == "trtllm" and not step.settings.get("states")


@functools.lru_cache
def include_folder(python: str) -> Path:
    """Where an interpreter's headers belong.

    Raises:
        OSError, subprocess.SubprocessError: it is none.
    """
    command = [python, "-I", compiler.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Path(done.stdout.strip())


@functools.lru_cache
def installed(python: str) -> dict[str, str]:
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


def package_problems(step: Step, machine: Machine) -> Iterator[str]:
    """Packages that a stage needs, and its interpreter lacks."""
    python = python_of(step.stage)
    try:
        found = installed(python)
    except (OSError, subprocess.SubprocessError) as error:
        expected = f"a Python interpreter at {python}"
        yield problem(
            step.stage, expected, str(error), f"Set EYRIE_{step.stage.upper()}_PYTHON to one."
        )
        return
    for name, floor in FLOORS[step.stage].items():
        if name == "vllm" and not uses_vllm(step):
            continue
        if name == "tensorrt-llm" and not _uses_trtllm(step):
            continue
        names = _NAMES.get(name, (name,))
        version = next((found[each] for each in names if each in found), None)
        if version is None or not is_within(version, floor):
            yield problem(
                f"{step.stage}'s packages",
                f"{name} {floor}",
                version or "none",
                f"Install it for {python}, or name another interpreter in "
                f"EYRIE_{step.stage.upper()}_PYTHON.",
            )
    yield from _trackers(step, found)
    computes = step.stage in ("dump", "train") or uses_vllm(step)
    torch = found.get("torch", "")
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


def compiler_problems(left: Sequence[Step], machine: Machine) -> Iterator[str]:
    """Kernels are compiled where they run: by vLLM and by train, on a GPU."""
    if not machine.gpus:
        return
    compiling = [step.stage for step in left if step.stage == "train" or uses_vllm(step)]
    for python in dict.fromkeys(map(python_of, compiling)):
        try:
            missing = compiler.lacking(include_folder(python))
        except (OSError, subprocess.SubprocessError):  # `package_problems` tells it
            continue
        if missing:
            stages = " and ".join(stage for stage in compiling if python_of(stage) == python)
            expected = "a C compiler and Python's headers, to compile kernels for the GPU"
            yield problem(stages, expected, missing, f"{compiler.REMEDY}.")
