# SPDX-License-Identifier: Apache-2.0
"""The chain through docker compose: each stage a container of its own image.

In: the recipe and a folder as workspace, which `compose.yaml` mounts. Out: the stages' own exit
codes: `docker compose run --rm` hands them on, where `up` and a chain of `depends_on` mask them. What
compose itself fails with is 1, as a bug of a stage would be; a stage that did not begin tells them
apart.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from shared.artifacts.provenance import git_revision
from shared.errors import EXIT_BUG, UserError
from shared.io import files
from shared.paths import RunPaths
from stages.ops.chain.machine import look
from stages.ops.chain.processes import SOURCE_ROOT
from stages.ops.config import RunChainConfig

RECIPE = "/etc/eyrie/recipe.yaml"  # where compose.yaml mounts it
ENV_FILE = SOURCE_ROOT / ".env"  # read by compose, too
_USER = "EYRIE_UID"
_DEFAULT_UID = 2000
# A folder that group 0 may write, as the images' own: their processes are of that group.
_MODE = 0o2775
_PROBES = (
    (["docker", "compose", "version"], "docker with its compose plugin"),
    (["docker", "version", "--format", "{{.Server.Version}}"], "a Docker engine that answers"),
)


def command_of(stage: str, config: RunChainConfig) -> list[str]:
    """The command line that runs a stage; COMPOSE_FILE names other files than these."""
    command = ["docker", "compose"]
    if "COMPOSE_FILE" not in _variables():
        command += ["--file", "compose.yaml"]
        command += [] if look().gpus else ["--file", "compose/cpu.yaml"]
    # Without a terminal: one would mix the stage's two streams, and take Ctrl-C for itself.
    command += ["run", "--rm", "-T", stage, "--recipe", RECIPE]
    return [*command, "--overwrite"] if config.overwrite else command


def environment(config: RunChainConfig, paths: RunPaths) -> dict[str, str]:
    """This process's, with the variables by which compose.yaml finds recipe and workspace."""
    return {
        # Two runs are two projects: one does not replace the other's containers.
        "EYRIE_RUN": re.sub(r"[^a-z0-9_-]", "-", paths.run_name.lower()),
        "EYRIE_REVISION": git_revision(),
        **os.environ,
        _USER: str(_user(paths.workspace)),
        "EYRIE_RECIPE": str(config.recipe.absolute()),
        "EYRIE_WORKSPACE": str(paths.workspace.absolute()),
    }


def _variables() -> Mapping[str, str]:
    """What compose substitutes: the environment over the file .env."""
    lines = files.read_text(ENV_FILE).splitlines() if ENV_FILE.exists() else []
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {**{name.strip(): value.strip() for name, value in pairs}, **os.environ}


def problems(paths: RunPaths) -> list[str]:
    """What stands in the way of any container: no docker, or a folder that is not its user's."""
    found = []
    if not (SOURCE_ROOT / "compose.yaml").exists():
        found.append(
            f"compose: expected compose.yaml in {SOURCE_ROOT}, found none. Run this from a checkout."
        )
    for command, expected in _PROBES:
        if complaint := _complaint(command):
            found.append(
                f"compose: expected {expected}, found: {complaint}. Install or start it, or leave "
                "--by compose out."
            )
            break
    folder = paths.root if paths.root.exists() else paths.workspace
    if folder.exists() and not _may_write(facts := folder.stat(), uid := _user(paths.workspace)):
        found.append(
            f"{_USER}: expected a user who can write in {folder}, found {uid}, while the folder is "
            f"of user {facts.st_uid} with mode {facts.st_mode & 0o7777:o}. Set {_USER} to its owner, "
            "or let group 0 write in it."
        )
    return found


def _user(workspace: Path) -> int:
    """The user of the containers: as somebody says, or who owns the workspace, but never root."""
    given = _variables().get(_USER, "")
    owner = workspace.stat().st_uid if workspace.exists() else os.getuid()
    return int(given) if given.isdigit() else owner or _DEFAULT_UID


def _may_write(facts: os.stat_result, uid: int) -> bool:
    own = facts.st_uid == uid and facts.st_mode & 0o200
    return bool(own or (facts.st_gid == 0 and facts.st_mode & 0o020) or facts.st_mode & 0o002)


def _complaint(command: list[str]) -> str:
    """Why a command does not work; "" where it does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"no answer to `{shlex.join(command)}` in 60 s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].rstrip(".") if done.returncode else ""


def prepare(paths: RunPaths) -> None:
    """Make the run's folder, such that a container's user may write in it.

    Raises:
        UserError: this user may not, or something else is there.
    """
    for folder in (paths.workspace, paths.root):
        try:
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(_MODE)
        except OSError as error:
            raise UserError(
                f"workspace: expected a folder that can be made at {folder}, found: "
                f"{error.strerror}.",
                code="workspace-unwritable",
                remedy="Give another --workspace, or let this user write there.",
                facts={"folder": str(folder)},
            ) from error


def start(stage: str, config: RunChainConfig, paths: RunPaths) -> "subprocess.Popen[bytes]":
    """Start a stage's container.

    Raises:
        UserError: there is no docker.
    """
    command = command_of(stage, config)
    try:
        return subprocess.Popen(command, cwd=SOURCE_ROOT, env=environment(config, paths))
    except OSError as error:
        raise UserError(
            f"--by compose: expected docker with its compose plugin, could not start docker: "
            f"{error.strerror}.",
            code="docker-missing",
            remedy="Install it, or leave --by compose out.",
        ) from error


def check_begun(stage: str, code: int, paths: RunPaths, started_s: float) -> None:
    """Tell compose's own failures from a stage's.

    Args:
        code: what `docker compose run` ended with.
        started_s: when it was started, in seconds since 1970.

    Raises:
        UserError: the code cannot be the stage's, which never began.
    """
    if code != EXIT_BUG and code not in range(125, 128):
        return
    status = paths.status(stage)
    # A status is touched every few seconds, and file systems may round its time to one.
    if status.exists() and status.stat().st_mtime >= started_s - 1:
        return
    raise UserError(
        f"docker compose ended with exit code {code} before {stage} began; its own error stands above.",
        code="compose-failed",
        remedy=f"To see it alone: docker compose run --rm {stage} --help",
        facts={"stage": stage, "exit_code": code},
    )
