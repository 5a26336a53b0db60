# SPDX-License-Identifier: Apache-2.0
"""`data_parallel`: several engines on one node, each a process with its own GPUs and shards.

Each child is this very command with a share of its own (see `shared/artifacts/sharding.py`); this process
waits, and completes the artifact when all are done.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from shared.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    EyrieError,
    OutputError,
    RetryableError,
    UserError,
)
from shared.runtime.process import die_with_parent, stop_if_requested, stop_requested
from stages.dump.config import DumpConfig

DEVICES = "CUDA_VISIBLE_DEVICES"
_POLL_S = 0.2
_KINDS: tuple[type[EyrieError], ...] = (UserError, OutputError, RetryableError)

logger = logging.getLogger(__name__)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    if DEVICES in os.environ:
        return [name for name in os.environ[DEVICES].split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def share_devices(devices: Sequence[str], engines: int, gpus_an_engine: int) -> list[str | None]:
    """What each engine's CUDA_VISIBLE_DEVICES shall be; None everywhere where there is no GPU.

    Worked example: GPUs 4,5,6,7 for two engines of two: ["4,5", "6,7"].

    Raises:
        UserError: there are GPUs, and too few.
    """
    if not devices:
        return [None] * engines
    if len(devices) < engines * gpus_an_engine:
        raise UserError(
            f"data_parallel {engines} with tensor_parallel_size {gpus_an_engine} needs "
            f"{engines * gpus_an_engine} GPUs, found {len(devices)}. Lower one of them."
        )
    starts = range(0, engines * gpus_an_engine, gpus_an_engine)
    return [",".join(devices[start : start + gpus_an_engine]) for start in starts]


def child_command(config: DumpConfig, engine: int, arguments: Sequence[str]) -> list[str]:
    """The command of engine `engine`: this process's `arguments`, with a part of its share.

    Worked example: process 1 of 3 with two engines makes the shards 1, 4, 7, 10, ...; its engines are
    the parts 1 (shards 1, 7, ...) and 4 (shards 4, 10, ...) of 6.
    """
    share = config.share
    own = {
        "shard_index": share.index + engine * share.count,
        "num_shards": share.count * config.data_parallel,
        "data_parallel": 1,
        "overwrite": "false",  # this process has replaced what was to be replaced
    }
    flags = [f"--{name}={value}" for name, value in own.items()]
    return [sys.executable, "-m", "stages.dump", *arguments, *flags]


def run_children(config: DumpConfig) -> None:
    """Run the engines to their end.

    Raises:
        UserError, OutputError, RetryableError: as the first engine that failed; the others were
            stopped, and what is whole is kept.
        Stopped: a signal asked for it.
    """
    parts = share_devices(visible_devices(), config.data_parallel, config.tensor_parallel_size)
    children = []
    for engine, devices in enumerate(parts):
        environment = dict(os.environ) if devices is None else {**os.environ, DEVICES: devices}
        command = child_command(config, engine, sys.argv[1:])
        logger.info("engine %d of %d on %s", engine, config.data_parallel, devices or "the CPU")
        children.append(
            # A group of its own: Ctrl-C reaches this process alone, which then asks the children.
            subprocess.Popen(
                command, env=environment, preexec_fn=die_with_parent, start_new_session=True
            )
        )
    failed = _wait(children)
    stop_if_requested("every whole shard is saved")
    if failed is not None:
        engine, code = failed
        kind = next((kind for kind in _KINDS if kind.exit_code == code), RetryableError)
        raise kind(
            f"engine {engine} of {config.data_parallel} ended with exit code {code}; its log is "
            f"above. The others were stopped; every whole shard is saved."
        )


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> tuple[int, int] | None:
    """(engine, exit code) of the first that failed, once all have ended."""
    failed: tuple[int, int] | None = None
    asked = False
    while any(child.poll() is None for child in children):
        for engine, child in enumerate(children):
            code = child.poll()
            if failed is None and code not in (None, EXIT_DONE, EXIT_STOPPED):
                failed = (engine, int(code or 0))
        if (failed or stop_requested()) and not asked:
            asked = True
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)
        time.sleep(_POLL_S)
    for engine, child in enumerate(children):
        if failed is None and child.returncode not in (EXIT_DONE, EXIT_STOPPED):
            failed = (engine, child.returncode)
    return failed
