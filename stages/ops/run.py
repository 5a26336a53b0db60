# SPDX-License-Identifier: Apache-2.0
"""The chain, locally: each stage a process of its own, as its container would be.

Comes in: a recipe. Goes out: what the stages make, and one last line that a script can read. The
chain stops at the first stage that fails and leaves with that stage's exit code.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shared import files
from shared.config import RunConfig, read_recipe
from shared.errors import EXIT_DONE, UserError
from shared.paths import RunPaths
from shared.process import stop_requested
from stages.ops.config import MakeTargetConfig, RunChainConfig

_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 120.0
_MAKES_TARGETS = ("tokenizers", "torch", "transformers")  # what make_target imports

logger = logging.getLogger(__name__)


def run(config: RunChainConfig) -> int:
    """Run the chosen stages; returns the exit code of the first that failed, or 0."""
    recipe = read_recipe(config.recipe)
    name = recipe.get("run", {}).get("name", RunConfig.model_fields["name"].default)
    paths = RunPaths(config.workspace, str(name))
    _keep_recipe(config.recipe, paths)
    seconds: dict[str, float] = {}
    for stage in config.only:
        started_s = time.monotonic()
        code = _run_stage(stage, config)
        seconds[stage] = time.monotonic() - started_s
        if code != EXIT_DONE:
            logger.error(
                "%s ended with exit code %d after %.0f s; its log: %s",
                stage,
                code,
                seconds[stage],
                paths.log(stage),
            )
            return code
    times = " ".join(f"{stage}_s={spent:.0f}" for stage, spent in seconds.items())
    logger.info("%s: all stages done: %s", name, times)
    if "bench" in config.only:
        sys.stdout.write(closing_line(paths) + "\n")
    return EXIT_DONE


def _keep_recipe(recipe: Path, paths: RunPaths) -> None:
    if recipe.absolute() != paths.recipe.absolute():
        files.write_text(paths.recipe, recipe.read_text(encoding="utf-8"))


def _run_stage(stage: str, config: RunChainConfig) -> int:
    """Run one stage to its end, passing on a signal that reaches this process.

    Raises:
        UserError: the stage is not in this image, or its interpreter does not start.
    """
    if not (_SOURCE_ROOT / "stages" / stage).is_dir():
        raise UserError(
            f"expected stage {stage} beside ops in {_SOURCE_ROOT / 'stages'}, found none: each stage "
            "has its own image. Run the chain with `docker compose -f compose.yaml -f "
            "compose/pipeline.yaml up`."
        )
    python = os.environ.get(f"EYRIE_{stage.upper()}_PYTHON", sys.executable)
    command = [python, "-m", f"stages.{stage}", "--recipe", str(config.recipe)]
    command += ["--workspace", str(config.workspace)]
    if config.overwrite:
        command.append("--overwrite")
    search_path = os.pathsep.join(filter(None, [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    logger.info("stage %s", stage)
    try:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": search_path})
    except OSError as error:
        raise UserError(
            f"EYRIE_{stage.upper()}_PYTHON: could not start {python}: {error.strerror}."
        ) from error
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if stop_requested():
                return _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def closing_line(paths: RunPaths) -> str:
    """`<run>: acceptance_length=3.12 head=... report=...`, from bench's report.

    Raises:
        UserError: there is no readable report.
    """
    report = files.read_json(paths.report)
    try:
        length = report["head"]["acceptance"]["acceptance_length"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{paths.report}: expected head.acceptance.acceptance_length.") from error
    return f"{paths.run_name}: acceptance_length={length:.2f} head={paths.export} report={paths.report}"


def run_make_target(config: MakeTargetConfig) -> None:
    """Make the demo's target, or find it made.

    Raises:
        UserError: this environment has no torch.
    """
    try:
        from stages.ops.make_target import make_target
    except ModuleNotFoundError as error:
        if error.name not in _MAKES_TARGETS:
            raise
        raise UserError(
            f"make-target trains a model and needs {', '.join(_MAKES_TARGETS)}; {error.name} is not "
            "installed here, as in the ops image. Run it where train runs: `make setup`, or with "
            "compose/demo.yaml."
        ) from error

    steps = {} if config.steps is None else {"steps": config.steps}
    facts = make_target(
        config.out,
        seed=config.seed,
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        **steps,
    )
    logger.info(
        "target at %s: %d parameters, mean next-token entropy %.3f nats, %.0f %% distinct answers",
        config.out,
        facts.parameters,
        facts.mean_entropy_nats,
        100 * facts.distinct_answers,
    )
