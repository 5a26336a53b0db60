# SPDX-License-Identifier: Apache-2.0
"""The kinds of faults: each takes a bed, a stage and a source of chance, and returns a judged case."""

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_RETRY, EXIT_STOPPED, EXIT_USER
from tests.faults import disks, processes
from tests.faults.bed import STAGES, Bed
from tests.faults.case import Case, errors_in, kill_engine
from tests.faults.damage import flipped, truncated

Kind = Callable[[Bed, str, random.Random], Case]
_KILLED = -signal.SIGKILL
_SHARES = [("--num_shards", "2", "--shard_index", str(index)) for index in range(2)]


def killed(bed: Bed, stage: str, chance: random.Random) -> Case:
    """kill -9."""
    case = Case(bed, stage, chance)
    with case.start() as process:
        case.wait_for_a_moment(process)
        process.signal(signal.SIGKILL)
        case.ended(process, _KILLED, EXIT_DONE)
    case.recover()
    return case


def stopped(bed: Bed, stage: str, chance: random.Random) -> Case:
    """SIGTERM: what is finished is saved."""
    case = Case(bed, stage, chance)
    with case.start() as process:
        case.wait_for_a_moment(process)
        process.signal(signal.SIGTERM)
        case.ended(process, EXIT_STOPPED, EXIT_DONE)
    case.recover()
    return case


def engine_killed(bed: Bed, stage: str, chance: random.Random) -> Case:
    """kill -9 of a child: the server of synth and bench, an engine of dump, a rank of train."""
    case = Case(bed, stage, chance, ranks=stage == "train")
    if stage == "dump":
        case.flags = [("--data_parallel", "2")]
    word = {"dump": "stages.dump", "train": "stages.train"}.get(stage, "api_server")
    with case.start() as process:
        case.wait_for_a_moment(process)
        if not kill_engine(case, process, word):
            case.detail += ", when it had ended"
        # synth starts a server of its own again, and goes on.
        case.ended(process, EXIT_RETRY, EXIT_DONE)
    case.recover()
    return case


def disk_full(bed: Bed, stage: str, chance: random.Random) -> Case:
    """No room for all that the stage writes; then there is."""
    case = Case(bed, stage, chance)
    size = int(chance.uniform(0.02, 0.95) * case.reference.bytes)
    case.detail = f"{size} of {case.reference.bytes} bytes"
    if not disks.can_mount():
        largest = max(p.stat().st_size for p in case.reference.root.rglob("*") if p.is_file())
        with case.start(before=disks.no_file_above(int(chance.uniform(0.01, 0.9) * largest))) as it:
            case.ended(it, EXIT_USER, EXIT_DONE)
        case.recover()
        return case
    with disks.small(case.world.root, size) as make_large:
        with case.start() as process:
            case.ended(process, EXIT_USER, EXIT_DONE)
        make_large()
        case.recover()
    return case


def read_only(bed: Bed, stage: str, chance: random.Random) -> Case:
    """The workspace takes no more writes, from the start or from some moment on."""
    case = Case(bed, stage, chance)
    if chance.random() < 0.3:
        case.detail = "from the start"
        with disks.read_only(case.world.root), case.start() as process:
            case.ended(process, EXIT_USER)
    else:
        with case.start() as process:
            case.wait_for_a_moment(process)
            with disks.read_only(case.world.root):
                case.ended(process, EXIT_USER, EXIT_DONE)
    case.recover()
    return case


def removed(bed: Bed, stage: str, chance: random.Random) -> Case:
    """A file of the stage's own folders is gone while it runs."""
    case = Case(bed, stage, chance)
    case.obeys = True
    with case.start() as process:
        case.wait_for_a_moment(process)
        present = [
            path
            for folder in case.world.folders(stage)
            for path in sorted(folder.rglob("*"))
            if (path.is_file() or path.is_symlink()) and not path.name.startswith(".lock")
        ]
        if present:
            path = chance.choice(present)
            path.unlink(missing_ok=True)
            case.detail += f": {path.relative_to(case.world.root)}"
        # What a stage checks before it lets it go may be what is gone: that is its own output.
        case.ended(process, EXIT_DONE, EXIT_USER, EXIT_RETRY, EXIT_OUTPUT)
    case.recover()
    return case


def twice(bed: Bed, stage: str, chance: random.Random) -> Case:
    """The same stage, or the same share of it, in two processes: one works, the other changes nothing."""
    case = Case(bed, stage, chance)
    if stage in ("synth", "dump") and chance.random() < 0.5:
        case.flags = _SHARES
    case.detail = "at once"
    with case.start() as one:
        if chance.random() < 0.3:  # else at once: the first may be done before the other is up
            case.wait_for_a_moment(one)
        with case.start() as two:
            codes = [case.ended(each, EXIT_DONE, EXIT_RETRY, alone=False) for each in (one, two)]
            said = [each.said() for each in (one, two)]
    if EXIT_DONE not in codes:
        case.problems.append(f"neither was done: {codes}")
    for code, text in zip(codes, said, strict=True):
        if code == EXIT_RETRY and "another process is working on" not in "".join(errors_in(text)):
            case.problems.append(f"no clear message: {errors_in(text)}")
    if codes == [EXIT_DONE] * 2:
        case.detail += ", one after the other"
        # A share may be done before the whole is; who comes later finds nothing left to do.
        if len(case.flags) == 1 and not any("already done" in text for text in said):
            case.problems.append("both worked on it")
    case.recover()
    return case


def dropped(bed: Bed, stage: str, chance: random.Random) -> Case:
    """The connection to the server is cut for a while; or, for synth, a foreign server is gone."""
    case = Case(bed, stage, chance)
    if stage == "synth" and chance.random() < 0.5:
        return _foreign_server_gone(case)
    drops = case.world.path / "drops"
    with case.start() as process:
        case.wait_for_a_moment(process)
        drops.touch()
        time.sleep(chance.uniform(0.05, 1.0))
        drops.unlink()
        case.ended(process, EXIT_DONE, EXIT_RETRY)
    case.recover()
    return case


def _engine(port: int, workspace: Path) -> "subprocess.Popen[bytes]":
    words = ["-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    own = processes.environment(workspace)
    engine = subprocess.Popen([sys.executable, *words], cwd=processes.ROOT, env=own)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return engine
        time.sleep(0.02)
    raise TimeoutError("the stand-in does not listen")


def _foreign_server_gone(case: Case) -> Case:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    case.flags = [("--endpoints", f"http://127.0.0.1:{port}")]
    engine = _engine(port, case.world.path)
    try:
        with case.start() as process:
            case.wait_for_a_moment(process)
            engine.kill()
            engine.wait()
            case.detail += ", a foreign server"
            case.ended(process, EXIT_DONE, EXIT_RETRY)
        engine = _engine(port, case.world.path)
        case.recover()
    finally:
        engine.kill()
        engine.wait()
    return case


KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "kill -9": (killed, STAGES),
    "SIGTERM": (stopped, STAGES),
    "engine or worker killed": (engine_killed, STAGES),
    "disk full": (disk_full, STAGES),
    "read-only": (read_only, STAGES),
    "file removed": (removed, STAGES),
    "artifact truncated": (truncated, STAGES),
    "artifact bit-flipped": (flipped, STAGES),
    "started twice": (twice, STAGES),
    "connection dropped": (dropped, ("synth", "bench")),
}
PAIRS = [(kind, stage) for kind, (_, stages) in KINDS.items() for stage in stages]
