# SPDX-License-Identifier: Apache-2.0
"""A small run to break: a tiny target, its answers, states and head, in a workspace of its own.

The whole run is made once and kept beside the system's temporary files; a case gets a copy.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.io import files
from tests import runs
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(tempfile.gettempdir()) / "eyrie-provoke-base"
_QUESTIONS = ("What is a list?", "Name a colour.", "Count to five.", "Say hello.")


def make_base() -> Path:
    """The whole tiny run: synth's artifact by transformers, dump and train by the real stages."""
    last = BASE / "run" / "export" / "manifest.json"
    sources = (path for folder in ("shared", "stages") for path in (ROOT / folder).rglob("*.py"))
    if not last.exists() or max(path.stat().st_mtime for path in sources) > last.stat().st_mtime:
        shutil.rmtree(BASE, ignore_errors=True)
        BASE.mkdir(parents=True)
        runs.make_synth(BASE)
        for stage in ("dump", "train"):
            done = runs.run(BASE, stage, *(("--epochs", "1") if stage == "train" else ()))
            if done.returncode != 0:
                raise RuntimeError(done.stderr)
    return BASE


class World:
    """One case's workspace, and what its failing command printed."""

    def __init__(self, workspace: Path, *, stages: Sequence[str]) -> None:
        self.workspace = workspace
        workspace.mkdir(parents=True)
        if stages:
            base = make_base()
            shutil.copytree(base / "tiny", workspace / "tiny")
        else:
            tiny_llama(workspace / "tiny", tied=True)
        for stage in stages:
            for name in (stage, "export") if stage == "train" else (stage,):
                shutil.copytree(base / "run" / name, workspace / "run" / name)
        runs.write_recipe(workspace, epochs=1)
        self.prompts([f'{{"prompt": "{text}"}}' for text in _QUESTIONS])
        self.console = ""
        self.code: int | None = None

    @property
    def target(self) -> Path:
        return self.workspace / "tiny"

    def folder(self, stage: str) -> Path:
        return self.workspace / "run" / stage

    def vouch(self, stage: str, path: Path) -> None:
        """Have the manifest name the file as it is now, as where it was damaged before it was hashed."""
        manifest = files.read_json(self.folder(stage) / "manifest.json")
        manifest["files"][path.name] = {
            "bytes": path.stat().st_size,
            "sha256": files.sha256(path),
        }
        files.write_json(self.folder(stage) / "manifest.json", manifest)

    def prompts(self, lines: Sequence[str]) -> None:
        (self.workspace / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))

    def recipe(self, section: str, **values: Any) -> None:
        """Change settings of the recipe."""
        path = self.workspace / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe.setdefault(section, {}).update(values)
        path.write_text(yaml.safe_dump(recipe))

    def config(self, **values: Any) -> None:
        """Change the target's config.json."""
        path = self.target / "config.json"
        files.write_json(path, files.read_json(path) | values)

    def run(
        self,
        stage: str,
        *flags: str,
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        watch: Callable[["World", "subprocess.Popen[str]"], None] | None = None,
    ) -> None:
        """The command that fails; `watch` runs beside it and may do it harm."""
        self.command([*before, *runs.command(self.workspace, stage, *flags)], environment, watch)

    def command(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        watch: Callable[["World", "subprocess.Popen[str]"], None] | None = None,
    ) -> None:
        """Any command, from the checkout's root, with what it prints kept."""
        with tempfile.TemporaryFile("w+") as console:
            process = subprocess.Popen(
                list(words),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "2", **(environment or {})},
                stdout=console,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                if watch:
                    watch(self, process)
                self.code = process.wait(timeout=300)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            console.seek(0)
            self.console = console.read()

    def wait_for(self, stage: str, text: str, *, timeout_s: float = 120) -> None:
        """Return once the stage's log holds `text`."""
        log = self.workspace / "run" / "logs" / f"{stage}.log"
        deadline = time.monotonic() + timeout_s
        while not (log.exists() and text in log.read_text(errors="replace")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{log} does not say {text!r}")
            time.sleep(0.1)


def children(pid: int) -> list[tuple[int, str]]:
    """(process id, command line) of all processes below `pid`."""
    found, parents = [], {pid}
    for entry in sorted(Path("/proc").iterdir(), key=lambda path: path.name.zfill(9)):
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            name = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, IndexError):
            continue
        if parent in parents:
            parents.add(int(entry.name))
            found.append((int(entry.name), name))
    return found


def python(*words: str) -> list[str]:
    return [sys.executable, *words]
