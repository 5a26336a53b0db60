# SPDX-License-Identifier: Apache-2.0
"""All ranks of one node: `python -m stages.train.launch --recipe recipe.yaml`, flags as train's own.

In: the machine's environment. EYRIE_RANKS ranks on this node (default: its GPUs, else one);
EYRIE_NODES nodes (default one), of which this is number EYRIE_NODE_RANK, else JOB_COMPLETION_INDEX;
MASTER_ADDR and MASTER_PORT of node 0 where there are several. Out: the exit code of the rank that
failed first. The reason to have this beside torchrun: that leaves with 1 whatever its ranks left
with, and those who start us read the codes. SIGTERM goes to every rank, which saves and leaves.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shared.artifacts.sharding import INDEX_VARIABLE
from shared.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_OUTPUT,
    EXIT_RETRY,
    EXIT_STOPPED,
    EXIT_USER,
)
from shared.runtime.process import catch_stop_signals, die_with_parent, stop_requested

_DEVICES = Path("/dev")
_POLL_S = 0.2
# A rank that lost another one hangs in a collective: it is asked to leave, then made to.
_GRACE_S = 60.0

Ranks = list["subprocess.Popen[bytes]"]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        sys.stderr.write(f"${name}: expected a number, found {text!r}.\n")
        sys.exit(EXIT_USER)
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environments(ranks: int, nodes: int, node: int) -> list[dict[str, str]]:
    """What each rank of this node is told, in torchrun's names.

    Worked example, 2 nodes of 4 ranks: on node 1, LOCAL_RANK 0 is RANK 4 of WORLD_SIZE 8.
    """
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        sys.stderr.write("$MASTER_ADDR: needed where $EYRIE_NODES is more than one.\n")
        sys.exit(EXIT_USER)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT") or ("29500" if nodes > 1 else str(_free_port()))
    common = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(ranks * nodes)}
    common["LOCAL_WORLD_SIZE"] = str(ranks)
    return [
        {**common, "RANK": str(node * ranks + local), "LOCAL_RANK": str(local)}
        for local in range(ranks)
    ]


def watch(processes: Ranks) -> int:
    """Wait for all; the first failure ends the others. Returns the node's exit code."""
    asked_to_stop = False
    while True:
        codes = [process.poll() for process in processes]
        if all(code == EXIT_DONE for code in codes):
            return EXIT_DONE
        if failed := [code for code in codes if code not in (None, EXIT_DONE)]:
            _end(processes)
            return _exit_code(failed, [process.returncode for process in processes])
        if stop_requested() and not asked_to_stop:
            asked_to_stop = True
            _signal(processes, signal.SIGTERM)
        time.sleep(_POLL_S)


def _exit_code(failed: Sequence[int | None], codes: Sequence[int]) -> int:
    """The first failure's code; a rank that a signal killed (out of memory, a node) may be retried.

    Ranks that lost another one end with EXIT_RETRY, so any code that says why goes before it.
    """
    if stop_requested() and EXIT_STOPPED in codes:
        return EXIT_STOPPED
    # Those that lost another one fail too, and may be seen before it.
    if any(code is not None and code < 0 for code in failed):
        return EXIT_RETRY
    told = [code for code in failed if code not in (None, EXIT_RETRY)]
    told += [code for code in codes if code in (EXIT_BUG, EXIT_USER, EXIT_OUTPUT)]
    return (told or failed)[0] or EXIT_RETRY


def _signal(processes: Ranks, label: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(label)


def _end(processes: Ranks) -> None:
    """Let the others leave by themselves; where all were asked to stop, a save takes what it takes."""
    _signal(processes, signal.SIGTERM)
    deadline = math.inf if stop_requested() else time.monotonic() + _GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, watch them."""
    command = [sys.executable, "-m", "stages.train", *arguments]
    ranks = _number("EYRIE_RANKS", len(list(_DEVICES.glob("nvidia[0-9]*"))) or 1)
    nodes = _number("EYRIE_NODES", 1)
    is_training = all(word.startswith("-") for word in arguments[:1])
    if ranks * nodes == 1 or not is_training or "--help" in arguments:
        os.execv(sys.executable, command)
    node = _number("EYRIE_NODE_RANK", _number(INDEX_VARIABLE, 0))
    catch_stop_signals()
    return watch(
        [
            subprocess.Popen(command, env={**os.environ, **own}, preexec_fn=die_with_parent)
            for own in environments(ranks, nodes, node)
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
