# SPDX-License-Identifier: Apache-2.0
"""All ranks of one node: `python -m stages.train.launch --recipe recipe.yaml`, flags as train's own.

In: the machine's environment. EYRIE_RANKS: ranks on this node (default: its visible GPUs, else 1);
EYRIE_NODES: nodes (default 1); EYRIE_NODE_RANK, else JOB_COMPLETION_INDEX: the number of this node;
MASTER_ADDR and MASTER_PORT of node 0 if there are several. Out: the exit code of the rank that
failed first, while torchrun exits with 1 for every failure. SIGTERM goes to every rank; each saves
and exits.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.artifacts.sharding import INDEX_VARIABLE
from shared.config import number_from
from shared.errors import EXIT_BUG, EXIT_DONE, EXIT_OUTPUT, EXIT_RETRY, EXIT_STOPPED, EXIT_USER
from shared.runtime.children import Children, held_port, wait_for_all
from shared.runtime.gpus import listed_devices
from shared.runtime.process import (
    catch_stop_signals,
    die_with_parent,
    hold_stop_signals,
    stop_requested,
)

_DEVICES = Path("/dev")
# Where several nodes meet, unless they are told otherwise.
_PORT = 29500
# A rank that lost another one hangs in a collective; after this time it is killed.
_GRACE_S = 60.0


def num_gpus() -> int:
    """GPUs that this process may use: those of $CUDA_VISIBLE_DEVICES, else all of the node."""
    listed = listed_devices()
    return len(list(_DEVICES.glob("nvidia[0-9]*"))) if listed is None else len(listed)


def _number(name: str, default: int, *, least: int = 0) -> int:
    try:
        return number_from(name, default, least=least)
    except ValueError as error:
        sys.stderr.write(f"{error}.\n")
        sys.exit(EXIT_USER)


def environments(ranks: int, nodes: int, node: int, free_port: int = _PORT) -> list[dict[str, str]]:
    """The environment of each rank of this node, with torchrun's names.

    Each rank gets its share of the cores, since torch would take all of them in every rank.

    Worked example, 2 nodes of 4 ranks: on node 1, LOCAL_RANK 0 is RANK 4 of WORLD_SIZE 8.
    """
    if node >= nodes:
        sys.stderr.write(
            f"$EYRIE_NODE_RANK, else ${INDEX_VARIABLE}: expected less than $EYRIE_NODES, {nodes}, "
            f"found {node}.\n"
        )
        sys.exit(EXIT_USER)
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        sys.stderr.write("$MASTER_ADDR: required if $EYRIE_NODES is more than 1.\n")
        sys.exit(EXIT_USER)
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = _number("MASTER_PORT", _PORT if nodes > 1 else free_port)
    common = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks * nodes)}
    common["LOCAL_WORLD_SIZE"] = str(ranks)
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return [
        {**common, "RANK": str(node * ranks + local), "LOCAL_RANK": str(local)}
        for local in range(ranks)
    ]


def watch(processes: Children) -> int:
    """Wait for all ranks; the first failure ends the others. Returns the node's exit code."""
    failed = wait_for_all(processes, grace_s=_GRACE_S)
    if not failed:
        return EXIT_DONE
    return _exit_code(list(failed.values()), [process.returncode for process in processes])


def _exit_code(failed: Sequence[int | None], codes: Sequence[int]) -> int:
    """The code that states the cause; a rank killed by a signal (out of memory) may be retried.

    Ranks that lost another one exit with EXIT_RETRY, so any other code takes precedence.
    """
    if stop_requested() and not {EXIT_STOPPED, -signal.SIGTERM}.isdisjoint(codes):
        return EXIT_STOPPED
    # Ranks that lost another one fail too, and maybe earlier than it is noticed.
    if any(code is not None and code < 0 for code in failed):
        return EXIT_RETRY
    causes = [code for code in failed if code not in (None, EXIT_RETRY)]
    causes += [code for code in codes if code in (EXIT_BUG, EXIT_USER, EXIT_OUTPUT)]
    return (causes or failed)[0] or EXIT_RETRY


def _prepare_rank() -> None:
    die_with_parent()
    # One that a stop ended while it imports would leave the others waiting for it to connect.
    hold_stop_signals()


def main(arguments: Sequence[str]) -> int:
    """Start the ranks and watch them; one rank alone replaces this process."""
    command = [sys.executable, "-m", "stages.train", *arguments]
    ranks = _number("EYRIE_RANKS", num_gpus() or 1, least=1)
    nodes = _number("EYRIE_NODES", 1, least=1)
    is_training = all(word.startswith("-") for word in arguments[:1])
    if ranks * nodes == 1 or not is_training or "--help" in arguments:
        os.execv(sys.executable, command)
    node = _number("EYRIE_NODE_RANK", _number(INDEX_VARIABLE, 0))
    catch_stop_signals()
    with held_port() as port:
        return watch(
            [
                subprocess.Popen(command, env={**os.environ, **own}, preexec_fn=_prepare_rank)
                for own in environments(ranks, nodes, node, port)
            ]
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
