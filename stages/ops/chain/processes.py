# SPDX-License-Identifier: Apache-2.0
"""Which stages a command means, and what each would do with the recipe, in its own words.

A stage alone knows its settings, and may run under another interpreter with other packages. So each
is asked as a process: `python -m stages.<s> --recipe R --print_config`, all of them at once.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST
from shared.cli import PRINT_CONFIG
from shared.config import RunConfig
from shared.errors import EXIT_DONE, UserError
from shared.paths import RunPaths
from shared.recipe import read_recipe
from shared.runtime.gpus import DEVICES
from shared.runtime.process import stop_if_requested
from stages.ops.chain.machine import look
from stages.ops.config import RunChainConfig

SOURCE_ROOT = Path(__file__).resolve().parents[3]
WORKSPACE = "/workspace"  # where compose.yaml mounts it


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of the chain.

    Attributes:
        settings: what recipe and defaults come to, as the stage itself says.
        done: whether its artifact is finished and stays.
        refusal: what the stage will say against an artifact of other settings; empty if nothing.
    """

    stage: str
    settings: Mapping[str, Any]
    done: bool
    refusal: str = ""

    @property
    def run(self) -> Mapping[str, Any]:
        """The recipe's section `run`, with defaults."""
        section: Mapping[str, Any] = self.settings["run"]
        return section

    @property
    def target(self) -> str:
        """The target that the stage loads: of a quantised one, dump and train load the original."""
        original = self.run["target_train"] if self.stage in ("dump", "train") else None
        return str(original or self.run["target"])


def uses_vllm(step: Step) -> bool:
    """Whether a stage starts vLLM on this machine."""
    served = step.settings.get("endpoints") or step.settings.get("endpoint")
    return (
        step.stage != "train"
        and not served
        and step.settings.get("backend") not in ("hf", "trtllm")
        and step.settings.get("mode") != "keep"
        and not step.settings.get("states")
    )


def run_paths(recipe: Path, workspace: Path) -> RunPaths:
    """Where the recipe's run lies.

    Raises:
        UserError: the recipe cannot be read.
    """
    name = read_recipe(recipe).get("run", {}).get("name")
    return RunPaths(workspace, str(name or RunConfig.model_fields["name"].default))


def python_of(stage: str) -> str:
    """The interpreter of a stage: $EYRIE_<STAGE>_PYTHON, or this one."""
    return os.environ.get(f"EYRIE_{stage.upper()}_PYTHON", sys.executable)


def command_of(stage: str, config: RunChainConfig, *, module: str = "") -> list[str]:
    """The command line that runs a stage, or another module that takes its flags."""
    # A stage of an image has no interpreter here; this one serves to ask it what it would do.
    python = sys.executable if config.by == "compose" else python_of(stage)
    command = [python, "-m", module or f"stages.{stage}", "--recipe", str(config.recipe)]
    command += ["--workspace", str(config.workspace)]
    return [*command, "--overwrite"] if config.overwrite else command


def environment() -> dict[str, str]:
    """This process's, with the source tree on the search path."""
    search_path = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path}


def run_stage(
    stage: str, config: RunChainConfig, *, gpus: str | None = None, cores: Collection[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a stage's work; train's with one rank for each GPU that it may use.

    Args:
        gpus: CUDA_VISIBLE_DEVICES of this stage alone.
        cores: the only cores that it may use.

    Raises:
        UserError: as `start`.
    """
    more: dict[str, Any] = {}
    if cores:
        more["preexec_fn"] = functools.partial(os.sched_setaffinity, 0, cores)
    own = environment() if gpus is None else {**environment(), DEVICES: gpus}
    if stage != "train":
        return start(command_of(stage, config), stage, env=own, **more)
    count = len(look().gpus) if gpus is None else len(gpus.split(","))
    command = command_of(stage, config, module="stages.train.launch")
    return start(command, stage, env={"EYRIE_RANKS": str(max(1, count)), **own}, **more)


def start(command: Sequence[str], stage: str, **more: Any) -> "subprocess.Popen[Any]":
    """Start a stage's process.

    Raises:
        UserError: the stage is not in this image, or its interpreter is none.
    """
    if not (SOURCE_ROOT / "stages" / stage).is_dir():
        raise UserError(
            f"expected stage {stage} beside ops in {SOURCE_ROOT / 'stages'}, found none: each stage "
            "has its own image.",
            code="stage-not-in-image",
            remedy="Run the chain with `docker compose -f compose.yaml -f compose/pipeline.yaml up`.",
            facts={"stage": stage},
        )
    try:
        return subprocess.Popen(command, **{"env": environment(), **more})
    except OSError as error:
        variable = f"EYRIE_{stage.upper()}_PYTHON"
        raise UserError(
            f"{variable}: expected a Python interpreter, could not start {command[0]}: "
            f"{error.strerror}.",
            code="interpreter-missing",
            remedy=f"Set {variable} to an interpreter that exists, or unset it.",
            facts={"stage": stage, "python": command[0]},
        ) from error


def is_done(stage: str, paths: RunPaths) -> bool:
    """Whether a stage has finished; train has once its export has."""
    folder = paths.export if stage == "train" else paths.stage(stage)
    return (folder / MANIFEST).exists()


def steps(config: RunChainConfig, stages: Sequence[str], paths: RunPaths) -> list[Step]:
    """Each stage's own word on the recipe.

    Raises:
        UserError: a stage refuses it; with that stage's message.
        Stopped: a signal asked for it.
    """
    answers = {
        stage: start(
            [*command_of(stage, config), PRINT_CONFIG],
            stage,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for stage in stages
    }
    answered = []
    for stage, process in answers.items():
        answer, complaint = process.communicate()
        stop_if_requested("no stage was begun")  # Ctrl-C has ended the processes that answer, too
        if process.returncode != EXIT_DONE:
            raise UserError(
                f"{stage} refuses {config.recipe}: {_message(complaint, stage)}",
                code="recipe-refused-by-stage",
                remedy="Correct the recipe.",
                facts={"stage": stage, "exit_code": process.returncode},
            )
        if config.by == "compose":
            answer = answer.replace(f'"{WORKSPACE}/', '"')  # found here where the workspace lies
        settings = json.loads(answer)
        refusal = settings.pop("refusal")
        stays = is_done(stage, paths) and not (refusal or config.overwrite)
        answered.append(Step(stage, settings, stays, refusal))
    return answered


def refused_heads(config: RunChainConfig, steps: Sequence[Step]) -> list[str]:
    """What train says against the head that it is to start from, before the stages ahead of it work.

    It loads the head, as only train can: a few seconds, and only where `init_from` is set.
    """
    step = next((step for step in steps if step.stage == "train" and not step.done), None)
    if step is None or step.settings["init_from"] is None:
        return []
    command = command_of("train", config)
    command.insert(command.index("stages.train") + 1, "check-head")
    asked = start(command, "train", stderr=subprocess.PIPE, text=True)
    _, complaint = asked.communicate()
    stop_if_requested("no stage was begun")
    return [] if asked.returncode == EXIT_DONE else [_message(complaint, "train")]


def _message(complaint: str, stage: str) -> str:
    """A stage's error in one line, without time, level, code and facts."""
    text = re.sub(r"^\[[\w-]*\] ", "", complaint.strip().split(f" {stage} ", 1)[-1])
    lines = [line.strip().removeprefix("remedy: ") for line in text.splitlines()]
    return " ".join(line for line in lines if not line.startswith("facts: "))
