# SPDX-License-Identifier: Apache-2.0
"""The chain on this machine: each stage a process of its own, or a container by docker compose.

Comes in: a recipe. Goes out: what the stages make, and one last line that a script can read. The
chain stops at the first stage that fails and leaves with that stage's exit code.
"""

import logging
import os
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from shared.artifacts.window import OFFER
from shared.errors import (
    EXIT_DONE,
    EXIT_RETRY,
    EXIT_STOPPED,
    EyrieError,
    RetryableError,
    UserError,
)
from shared.io import files
from shared.paths import RunPaths
from shared.recipe import read_recipe
from shared.runtime.process import stop_if_requested, stop_requested
from stages.ops.chain import containers, pair, processes
from stages.ops.chain.kubernetes import jobs
from stages.ops.chain.kubernetes.kubectl import Overlay
from stages.ops.config import RunChainConfig

# What a stage that was asked to stop gets to save; as compose.yaml's stop_grace_period.
_GRACE_S = 300.0
_POLL_S = 0.1
# How a stage ends that lost another one, or that was stopped: by itself, or while it imported.
_NO_CAUSES = (EXIT_RETRY, EXIT_STOPPED, -signal.SIGTERM, -signal.SIGINT)

logger = logging.getLogger(__name__)


def run(config: RunChainConfig) -> int:
    """Run the chosen stages; returns the exit code of the first that failed, or 0.

    Raises:
        UserError: a stage refuses the recipe, or something that can be seen now stands in the way.
    """
    if config.overlay:
        overlay = Overlay.render(config.overlay)
        pair.refuse_on_kubernetes(config, overlay)
        return jobs.run(config.recipe, overlay, config.stages)
    paths = processes.run_paths(config.recipe, config.workspace)
    if config.dry_run or config.preflight:
        look_ahead(config, paths)
    if config.dry_run:
        return EXIT_DONE
    if config.by == "compose":
        containers.prepare(paths)
    _keep_recipe(config.recipe, paths)
    seconds: dict[str, float] = {}
    for stages in pair.groups(config.stages, config.recipe):
        stop_if_requested(f"{stages[0]} was not begun")
        started_s = time.monotonic()
        stage, code = _run_together(stages, config, paths)
        seconds["+".join(stages)] = spent_s = time.monotonic() - started_s
        if code != EXIT_DONE:
            logger.log(
                logging.INFO if code == EXIT_STOPPED else logging.ERROR,
                "%s ended with exit code %d after %.0f s; its log: %s",
                stage,
                code,
                spent_s,
                paths.log(stage),
            )
            if stage == "bench":  # it writes its page also where a gate is missed
                _show_page(paths, since_s=time.time() - spent_s, opens=config.open_page)
            return code
    times = " ".join(f"{stage}_s={spent:.0f}" for stage, spent in seconds.items())
    logger.info("%s: all stages done: %s", paths.run_name, times)
    if "bench" in config.stages:
        _show_page(paths, opens=config.open_page)
        sys.stdout.write(closing_line(paths) + "\n")
    return EXIT_DONE


def look_ahead(config: RunChainConfig, paths: RunPaths, *, even_if_done: bool = False) -> None:
    """Ask the stages and the machine whether this can work; a dry run shows the plan too.

    Args:
        even_if_done: ask also where nothing is left to do; artifacts of other settings are told.

    Raises:
        UserError: with one line for each problem.
        RetryableError: the same, where only a hub's answers are missing.
    """
    undone = [stage for stage in config.stages if not processes.is_done(stage, paths)]
    if not (config.dry_run or config.overwrite or undone or even_if_done):
        return  # a finished chain takes seconds, and needs nothing
    # Here, not above: a chain that is done must not wait for them.
    from stages.ops.chain import estimates, inputs
    from stages.ops.chain.machine import look
    from stages.ops.chain.preflight import checks
    from stages.ops.chain.preflight.rows import row_warnings
    from stages.ops.chain.rows import Looks

    steps = processes.steps(config, config.stages, paths)
    machine, looks = look(), Looks(paths.workspace)
    look_for = checks.problems if config.by == "processes" else checks.problems_of_containers
    found = look_for(steps, paths, machine, looks) if config.preflight else []
    if config.preflight and not found and config.by == "processes":
        found = processes.refused_heads(config, steps)
    for warning in [*checks.warnings(steps), *row_warnings(steps, looks)]:
        logger.warning("%s", warning)
    if config.dry_run or not found:
        ahead = estimates.Estimates(steps, paths, machine, looks, asks_hub=config.preflight)
        rows = ahead.rows()
        for warning in ahead.warnings():
            logger.warning("%s", warning)
        if config.dry_run:
            console = Console(width=None if sys.stdout.isatty() else 160)
            estimates.show(paths.run_name, rows, machine, console)
        if line := ahead.expectation():
            logger.info("expected: %s", line)
    if found:
        left = [step for step in steps if not step.done]
        raise _refusal(found, inputs.unanswered(left, paths) if config.by == "processes" else [])


def _refusal(found: Sequence[str], unanswered: Sequence[RetryableError]) -> EyrieError:
    """The last problem as an error, after a line for each of the others."""
    *others, last = found
    for other in others:
        logger.error("%s", other)
    of_the_hub = {str(error): error for error in unanswered}
    if of_the_hub.keys() == set(found):  # nothing is known to be wrong
        return of_the_hub[last]
    reasons = f"{len(found)} reasons, of which this is the last" if others else "one reason"
    return UserError(f"the chain would fail, for {reasons}: {last}", code="preflight-failed")


def _keep_recipe(recipe: Path, paths: RunPaths) -> None:
    if recipe.absolute() != paths.recipe.absolute():
        files.write_text(paths.recipe, recipe.read_text(encoding="utf-8"))


def _run_together(
    stages: Sequence[str], config: RunChainConfig, paths: RunPaths
) -> tuple[str, int]:
    """Run stages to their end, passing on a signal that reaches this process.

    The first that fails ends the others.

    Returns:
        the stage that failed first, or the last one, and its exit code.
    """
    logger.info("stage %s", " and ".join(stages))
    started_s = time.time()
    if len(stages) > 1 and config.overwrite:
        # Train must not take what an earlier dump told for what this one will tell.
        with files.writing(paths.stage("dump")):
            (paths.stage("dump") / OFFER).unlink(missing_ok=True)
    running = {stage: _start(stage, config, paths, len(stages) > 1) for stage in stages}
    failed: list[str] = []
    while not failed and not stop_requested() and any(p.poll() is None for p in running.values()):
        time.sleep(_POLL_S)
        failed = [stage for stage, process in running.items() if process.poll()]
    if failed or stop_requested():
        for stage, process in running.items():
            if failed and process.poll() is None:
                logger.info("%s is asked to stop: %s has ended", stage, " and ".join(failed))
        _stop(running.values())
    codes = {stage: process.returncode for stage, process in running.items()}
    if config.by == "compose":
        for stage in failed:
            containers.check_begun(stage, codes[stage], paths, started_s)
    # One that only lost the other, or was asked to stop, is not the cause, even if it was gone before.
    ended = failed or [stage for stage in stages if codes[stage]]  # all ended between two looks
    ended += [stage for stage in stages if codes[stage] > 0 and stage not in ended]
    causes = sorted(ended, key=lambda stage: codes[stage] in _NO_CAUSES)
    stage = (causes or [stages[-1]])[0]
    return stage, _as_shell_code(codes[stage])


def _start(
    stage: str, config: RunChainConfig, paths: RunPaths, has_company: bool
) -> "subprocess.Popen[bytes]":
    if config.by == "compose":
        return containers.start(stage, config, paths)
    return processes.run_stage(stage, config, **pair.share(stage, config) if has_company else {})


def _as_shell_code(code: int) -> int:
    """An exit code; 128 + n of a process that signal n ended, where Python says -n.

    Ctrl-C reaches a stage too, and ends one that still imports: that is a stop.
    """
    if code == -signal.SIGINT and stop_requested():
        return EXIT_STOPPED
    return code if code >= 0 else 128 - code


def _stop(running: Iterable["subprocess.Popen[bytes]"]) -> None:
    """Ask all to stop, give them the time to save, and wait for their ends."""
    until_s = time.monotonic() + _GRACE_S
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _show_page(paths: RunPaths, *, since_s: float = 0.0, opens: bool) -> None:
    """Name the report's page as a link, and open it where a desktop was asked to."""
    page = paths.report.with_suffix(".html")
    if not page.exists() or page.stat().st_mtime < since_s:
        return
    link = page.absolute().as_uri()
    logger.info("the report's page: %s", link)
    if not opens:
        return
    has_desktop = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if not (has_desktop and webbrowser.open(link)):
        logger.warning("no desktop with a browser here: open the page yourself")


def closing_line(paths: RunPaths) -> str:
    """`<run>: acceptance_length=3.12 head=... report=...`, from bench's report.

    The head is what was measured: the run's export, bench.head, or the server of bench.endpoint.

    Raises:
        UserError: there is no readable report.
    """
    report = files.read_json(paths.report)
    try:
        length = report["head"]["acceptance"]["acceptance_length"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{paths.report}: expected head.acceptance.acceptance_length.",
            code="report-incomplete",
            remedy="Run bench again with --overwrite.",
        ) from error
    bench = read_recipe(paths.recipe).get("bench", {})
    head = bench.get("head") or bench.get("endpoint") or paths.export
    return f"{paths.run_name}: acceptance_length={length:.2f} head={head} report={paths.report}"
