# SPDX-License-Identifier: Apache-2.0
"""One process or many: accelerate starts them from torchrun's environment, DDP or FSDP2 joins them.

torchrun's environment is RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, on one node or
several. FSDP2 is torch's own `fully_shard`: accelerate's way into it asks for a GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from shared.errors import RetryableError
from shared.runtime import processor
from stages.train.config import TrainConfig
from stages.train.loop.step import TrainingStep
from stages.train.model import DraftHead

_PREFIX = "head."
# What gloo and NCCL say in plain RuntimeErrors.
_LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "gloo", "NCCL")
_WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The process group, the device, autocast and trackers.

    Raises:
        RetryableError: the ranks did not meet; a port was taken, an address out of reach.
    """
    # The head's buffers never change, so ranks need not exchange them at each step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[ddp],
            log_with=list(config.trackers) or None,
            project_dir=folder / "trackers",
        )
    except torch.distributed.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RetryableError(
            f"train's ranks did not meet at {place}: {str(error).splitlines()[0][:300]}. $MASTER_PORT must "
            "be free on the first node, and $MASTER_ADDR within reach of all."
        ) from error
    if config.trackers:
        accelerator.init_trackers(config.run.name)
    if accelerator.device.type == "cpu":
        processor.keep_freed_memory()
        processor.keep_order_of_sums()
    return accelerator


def product_dtype(accelerator: Accelerator) -> torch.dtype:
    """What autocast makes of matrix products."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def joined(accelerator: Accelerator, step: TrainingStep, how: str) -> nn.Module:
    """The step as one that exchanges its gradients with the other ranks'."""
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
    """The head inside a joined step."""
    inner: Any = getattr(module, "module", module)
    head: DraftHead = inner.head
    return head


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A block in which ranks wait for each other, and may wait for one that is gone.

    Raises:
        RetryableError: another rank ended in the middle.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        is_lost = isinstance(error, torch.distributed.DistError)
        is_lost = is_lost or any(sign in told for sign in _LOST)
        if accelerator.num_processes == 1 or not is_lost:
            raise
        raise RetryableError(
            f"another rank of this training is gone: {told.splitlines()[0][:300]}. Its own log says "
            "why; run the same command again."
        ) from error


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[DraftHead]:
    """The head with all its weights on this rank, to be used outside of the step's forward."""
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
    """Weights by the exported names, and the optimizer's state, whole; empty but on rank 0.

    Every rank calls it.
    """
    weights, moments = states.get_state_dict(module, optimizer, options=_WHOLE)
    return {
        "weights": {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()},
        "optimizer": moments,
    }


def restore_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Take over a gathered state, whatever the number of ranks that made it."""
    states.set_state_dict(
        module,
        optimizer,
        model_state_dict={_PREFIX + name: tensor for name, tensor in state["weights"].items()},
        optim_state_dict=state["optimizer"],
        options=_WHOLE,
    )
