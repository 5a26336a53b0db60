# SPDX-License-Identifier: Apache-2.0
"""One rank or several: accelerate reads torchrun's environment, DDP or FSDP2 shares the step.

torchrun's environment is RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, on one or more
nodes. FSDP2 is torch's own `fully_shard`, since accelerate's wrapper needs a GPU.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from shared.errors import RetryableError, UserError
from shared.io.files import write_json
from shared.io.records import Shape, read_record
from shared.runtime import process, processor
from stages.train.config import TrainConfig
from stages.train.loop.step import TrainingStep
from stages.train.model import DraftHead

PRECISION = "precision.json"
_DELETE = "Delete it, and the precision is measured again."
_PREFIX = "head."
# Texts of gloo and NCCL for a rank that is gone. Both raise plain RuntimeErrors too.
_LOST = (
    "onnection closed by",
    "onnection reset by",
    "Broken pipe",
    "gloo/transport",
    "ncclRemoteError",
    "remote process exited",
    "communicator was aborted",
    "collective operation timeout",
)
# NCCL's own failures that come again: two ranks on one GPU, no shared memory, a broken driver.
_NCCL = ("NCCL error", "NCCL Error", "ncclInvalidUsage", "ncclSystemError", "ncclInternalError")
logger = logging.getLogger(__name__)

_WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
_OWN = states.StateDictOptions(full_state_dict=True)


class Precision(Shape):
    """The file that keeps what `mixed_precision: auto` came to."""

    mixed_precision: Literal["no", "bf16"]


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The process group, the device, autocast and trackers.

    Raises:
        RetryableError: the ranks did not connect, because a port was taken or an address unreachable.
    """
    processor.keep_order_of_sums()  # before the first product, which MKL reads the setting at
    # The head's buffers never change, so ranks need not exchange them at each step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # accelerate's PartialState, made first, does not read this variable as its Accelerator does; and
    # ranks on a machine without an accelerator would not know of each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        PartialState(cpu=on_cpu)
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=_precision(config, folder / PRECISION),
            kwargs_handlers=[ddp],
            log_with=list(config.trackers) or None,
            project_dir=folder / "trackers",
        )
    except torch.distributed.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RetryableError(
            f"the ranks did not connect at {address}: {_first_line(error)}.",
            code="ranks-not-connected",
            remedy="Make $MASTER_PORT free on the first node and $MASTER_ADDR reachable from all.",
            facts={"address": address},
        ) from error
    if accelerator.num_processes > 1:  # gloo's threads outlive the process group
        process.expect_threads_to_outlive_the_work()
    if config.trackers:
        accelerator.init_trackers(config.run.name)
    if accelerator.device.type == "cpu":
        processor.keep_freed_memory()
    return accelerator


def stop_if_any_rank_is_to(accelerator: Accelerator) -> None:
    """Leave here, all ranks together, if a stop was asked for while they started.

    Raises:
        Stopped: a signal reached one of them.
    """
    votes = torch.tensor(float(process.stop_requested()), device=accelerator.device)
    if summed(accelerator, votes) > 0:
        raise process.stopped("the training was not begun")


def require_trackers(config: TrainConfig) -> None:
    """Refuse a tracker that accelerate would leave out with one line of its log.

    Raises:
        UserError: its package is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in installed]:
        raise UserError(
            f"train.trackers: expected trackers that are installed, found no {', '.join(missing)} in "
            f"{sys.prefix}.",
            code="tracker-not-installed",
            remedy=f"Leave {', '.join(missing)} out, or install it beside accelerate.",
            facts={"missing": missing, "installed": installed},
        )


def _precision(config: TrainConfig, path: Path) -> str:
    """`no` or `bf16`: the config's, or for `auto` the faster one, measured once for a training.

    It is kept in `path`, so that a training resumed on another machine computes alike. Rank 0
    decides for all.
    """
    if config.mixed_precision != "auto":
        return config.mixed_precision
    state = PartialState()
    decided: list[Any] = [None]
    if state.is_main_process:
        recorded = read_record(path, Precision, remedy=_DELETE) if path.exists() else {}
        decided = [recorded.get("mixed_precision") or _faster_precision(state.device)]
        write_json(path, {"mixed_precision": decided[0]})
        logger.info("mixed_precision auto: %s", decided[0])
    if state.num_processes > 1:
        broadcast_object_list(decided)
    return str(decided[0])


def _faster_precision(device: torch.device) -> str:
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = device.type == "cpu" and processor.faster_dtype() == torch.bfloat16
    return "bf16" if is_faster else "no"


def joined(accelerator: Accelerator, step: TrainingStep, how: str) -> nn.Module:
    """The step as a module that exchanges its gradients with the other ranks."""
    step.to(accelerator.device)
    if accelerator.num_processes == 1:
        return step
    if how == "fsdp2":
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        fully_shard(step, mesh=mesh)
        return step
    wrapped: nn.Module = accelerator.prepare_model(step)
    return wrapped


def head_of(module: nn.Module) -> DraftHead:
    """The head in a joined step."""
    inner: Any = getattr(module, "module", module)
    head: DraftHead = inner.head
    return head


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A block in which ranks wait for each other.

    Raises:
        RetryableError: another rank has ended.
        UserError: NCCL failed for another reason.
    """
    try:
        yield
    except RuntimeError as error:
        refusal = _refusal(error) if accelerator.num_processes > 1 else None
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: RuntimeError) -> RetryableError | UserError | None:
    """What a failed collective means; None if it is no failure of a collective."""
    text = str(error)
    lost = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    if isinstance(error, lost) or any(sign in text for sign in _LOST):
        return RetryableError(
            f"another rank of this training is gone: {_first_line(error)}.",
            code="rank-lost",
            remedy="Its own log states the cause; run the same command again.",
        )
    if isinstance(error, torch.distributed.DistError) or any(sign in text for sign in _NCCL):
        return UserError(
            f"the ranks cannot exchange gradients: {_first_line(error)}.",
            code="nccl-failed",
            remedy="Give each rank its own GPU and the container enough shared memory; "
            "NCCL_DEBUG=INFO logs the cause.",
        )
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[DraftHead]:
    """The head with all its weights on this rank, in evaluation mode."""
    if isinstance(module, FSDPModule):
        module.unshard()
    head = head_of(module)
    head.eval()
    try:
        yield head
    finally:
        head.train()
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Unsharded weights by their exported names, and the optimizer's state: rank 0's count alone.

    Every rank calls it. FSDP2's parts are put together in main memory; otherwise these are the weights
    themselves, which the next step changes.
    """
    options = _WHOLE if isinstance(module, FSDPModule) else _OWN
    weights, moments = states.get_state_dict(module, optimizer, options=options)
    return {
        "weights": {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()},
        "optimizer": moments,
    }


def restore_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Load a gathered state of any number of ranks.

    Raises:
        UserError: it is that of a head with other tensors.
    """
    differing = sorted(set(head_of(module).state_dict()) ^ set(state["weights"]))
    if differing:
        raise UserError(
            f"the latest checkpoint: expected the tensors of this head, found others: {differing[:6]}.",
            code="checkpoint-of-another-variant",
            remedy="Set train.variant, train.layer and train.parallel_drafting to those of the run that "
            "wrote it, or give --overwrite to begin anew.",
            facts={"differing": differing},
        )
    states.set_state_dict(
        module,
        optimizer,
        model_state_dict={_PREFIX + name: tensor for name, tensor in state["weights"].items()},
        optim_state_dict=state["optimizer"],
        options=_WHOLE,
    )


def summed(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    if accelerator.num_processes == 1:
        return tensor
    total: torch.Tensor = accelerator.reduce(tensor)
    return total
