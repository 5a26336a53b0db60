# SPDX-License-Identifier: Apache-2.0
"""A stage as a real process, `python -m stages.<stage> run`, in a workspace that is to be disturbed.

The engine is tests/faults/stand_in's: the stages start it, watch it and end it as they do vLLM's.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in")
LIMIT_S = 120.0
_GONE_S = 10.0


def environment(workspace: Path) -> dict[str, str]:
    """As a stage's, with the stand-in for vLLM, and one thread: two runs then agree to the bit."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(STAND_IN), str(ROOT))),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "STAND_IN_DROPS": str(workspace / "drops"),
        "STAND_IN_TOKENS": str(workspace / "tokens"),
    }


class Stage:
    """A running stage; `with` ends it, whatever happens."""

    def __init__(
        self,
        workspace: Path,
        stage: str,
        *flags: str,
        more: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.workspace, self.stage = workspace, stage
        ranks = "EYRIE_RANKS" in (more or {})
        words = ["-m", "stages.train.launch"] if ranks else ["-m", f"stages.{stage}", "run"]
        words += ["--recipe", str(workspace / "recipe.yaml"), "--workspace", str(workspace), *flags]
        self._console = (workspace / f"console-{time.monotonic_ns()}").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**environment(workspace), **(more or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before,
        )
        self.pid = self._process.pid

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self._console.close()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def signal(self, what: signal.Signals) -> None:
        self._process.send_signal(what)

    def wait(self) -> int:
        """The exit code; -99 where it hangs and was killed."""
        try:
            return self._process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            return -99

    def said(self) -> str:
        """What it printed so far, its children included."""
        return Path(self._console.name).read_text(errors="replace")


def run(
    workspace: Path, stage: str, *flags: str, more: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(exit code, what it printed) of a stage that nobody disturbs."""
    with Stage(workspace, stage, *flags, more=more) as process:
        return process.wait(), process.said()


def processes() -> Iterator[tuple[int, int, str]]:
    """(id, parent's id, command line) of every process of this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "cmdline").read_text().replace("\0", " ")
                yield int(entry.name), parent, words


def children(pid: int, word: str) -> list[int]:
    """Processes below `pid` whose command holds `word`."""
    known, found = list(processes()), []
    below = {pid}
    for _ in known:  # as deep as it may go
        more = {child for child, parent, _ in known if parent in below} - below
        if not more:
            break
        below |= more
    found = [child for child, _, words in known if child in below - {pid} and word in words]
    return sorted(found)


def left_behind(workspace: Path) -> list[str]:
    """Commands that still work on this workspace some seconds after their stage has ended."""
    deadline = time.monotonic() + _GONE_S
    while True:
        found = [(pid, words) for pid, _, words in processes() if str(workspace) in words]
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for pid, _ in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [words[:120] for _, words in found]
