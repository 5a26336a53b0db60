# SPDX-License-Identifier: Apache-2.0
"""`data_parallel`: several engines on one node, each a process with its own GPUs and shards.

Each child is this very command with a share of its own (see `shared/artifacts/sharding.py`); this
process waits, and completes the artifact when all are done.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from shared.errors import EXIT_BUG, EXIT_STOPPED, EyrieError, OutputError, RetryableError, UserError
from shared.runtime.children import wait_for_all
from shared.runtime.gpus import DEVICES, listed_devices
from shared.runtime.process import die_with_parent, stop_if_requested, stopped
from stages.dump.config import ENGINES_VARIABLE, DumpConfig

logger = logging.getLogger(__name__)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    if (listed := listed_devices()) is not None:
        return listed
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def share_devices(devices: Sequence[str], engines: int, gpus_an_engine: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each engine; None for all where there is no GPU.

    Worked example: GPUs 4,5,6,7 for two engines of two: ["4,5", "6,7"].

    Raises:
        UserError: there are GPUs, and too few.
    """
    if not devices:
        return [None] * engines
    if len(devices) < engines * gpus_an_engine:
        raise UserError(
            f"data_parallel {engines} with tensor_parallel_size {gpus_an_engine} needs "
            f"{engines * gpus_an_engine} GPUs, found {len(devices)}.",
            code="too-few-gpus",
            remedy="Lower dump.data_parallel or dump.tensor_parallel_size.",
            facts={"needed": engines * gpus_an_engine, "found": len(devices)},
        )
    starts = range(0, engines * gpus_an_engine, gpus_an_engine)
    return [",".join(devices[start : start + gpus_an_engine]) for start in starts]


def child_command(config: DumpConfig, engine: int, arguments: Sequence[str]) -> list[str]:
    """The command of engine number `engine`: this process's `arguments`, with a part of its share.

    Worked example: process 1 of 3 with two engines makes the shards 1, 4, 7, 10, ...; its engines are
    the parts 1 (shards 1, 7, ...) and 4 (shards 4, 10, ...) of 6.
    """
    share = config.share
    own = {
        "shard_index": share.index + engine * share.count,
        "num_shards": share.count * config.data_parallel,
        "data_parallel": 1,
        "overwrite": "false",  # this process has already replaced what it should
    }
    flags = [f"--{name}={value}" for name, value in own.items()]
    return [sys.executable, "-m", "stages.dump", *arguments, *flags]


def run_children(config: DumpConfig) -> None:
    """Run the engines to their end.

    Raises:
        EyrieError: of the same exit code as the first engine that failed (75 where a signal ended
            it); the others were stopped, and every whole shard is kept.
        Stopped: a signal asked for it.
    """
    parts = share_devices(visible_devices(), config.data_parallel, config.tensor_parallel_size)
    children = []
    for engine, devices in enumerate(parts):
        environment = {**os.environ, ENGINES_VARIABLE: str(config.data_parallel)}
        if devices is not None:
            environment[DEVICES] = devices
        command = child_command(config, engine, sys.argv[1:])
        logger.info("engine %d of %d on %s", engine, config.data_parallel, devices or "the CPU")
        children.append(
            # A group of its own: Ctrl-C reaches only this process, which then asks the children.
            subprocess.Popen(
                command, env=environment, preexec_fn=die_with_parent, start_new_session=True
            )
        )
    failed = wait_for_all(children)
    stop_if_requested("every whole shard is saved")
    for engine, code in failed.items():
        if code == EXIT_STOPPED:
            raise stopped("every whole shard is saved")
        raise _engine_error(engine, code, engines=config.data_parallel)


def _engine_error(engine: int, exit_code: int, *, engines: int) -> EyrieError:
    """The error of an engine's process, as an error of this one with the same exit code."""
    kinds = {kind.exit_code: kind for kind in (UserError, OutputError, RetryableError)}
    kind = RetryableError if exit_code < 0 else kinds.get(exit_code, EyrieError)
    remedy = "Its log is above, with the cause."
    if kind.exit_code == EXIT_BUG:
        remedy += " It is a bug in eyrie: report it with that log."
    return kind(
        f"engine {engine} of {engines} ended with exit code {exit_code}. The others were stopped; "
        "every whole shard is saved.",
        code="engine-process-failed",
        remedy=remedy,
        facts={"engine": engine, "exit_code": exit_code},
    )
