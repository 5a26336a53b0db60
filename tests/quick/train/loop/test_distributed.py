# SPDX-License-Identifier: Apache-2.0
"""What a failed collective means, and the precision that `auto` comes to."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import tracking

from shared.errors import EyrieError, RetryableError, UserError
from shared.runtime import processor
from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.loop import distributed
from tests.runs import ROOT

LOST = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]",
    "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, "
    "NCCL version 2.27\nncclRemoteError: A call failed possibly due to a network error",
    "NCCL communicator was aborted on rank 1.",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)",
]
AGAIN_THE_SAME = [
    "NCCL error in: NCCLUtils.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details)\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000",
    "NCCL Error 2: unhandled system error (run with NCCL_DEBUG=INFO for details)",
]


def ending(text: str, ranks: int = 2, kind: type[RuntimeError] = RuntimeError) -> Exception:
    accelerator: Any = SimpleNamespace(num_processes=ranks)
    with pytest.raises((RuntimeError, EyrieError)) as ended, distributed.together(accelerator):
        raise kind(text)
    return ended.value


@pytest.mark.parametrize("text", LOST)
def test_a_rank_that_is_gone_is_worth_another_try(text: str) -> None:
    error = ending(text)
    assert isinstance(error, RetryableError)
    assert error.code == "rank-lost"
    assert type(ending(text, ranks=1)) is RuntimeError


@pytest.mark.parametrize("text", AGAIN_THE_SAME)
def test_a_setting_that_nccl_cannot_work_with_is_not_tried_again(text: str) -> None:
    for kind in (RuntimeError, torch.distributed.DistBackendError):
        error = ending(text, kind=kind)
        assert isinstance(error, UserError)
        assert error.code == "nccl-failed"


def test_other_errors_stay_bugs() -> None:
    assert type(ending("shape mismatch in NCCLike")) is RuntimeError


def precision(folder: Path, flag: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(processor, "faster_dtype", lambda: dtype)
    flags = {"target": "t", "workspace": str(folder), "mixed_precision": flag}
    return distributed._precision(build(TrainConfig, flags), folder / distributed.PRECISION)


def test_a_resumed_training_keeps_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert precision(tmp_path, "auto", torch.bfloat16, monkeypatch) == "bf16"
    assert precision(tmp_path, "auto", torch.float32, monkeypatch) == "bf16", "as it began"
    assert precision(tmp_path, "no", torch.float32, monkeypatch) == "no", "as the recipe says"
    (tmp_path / distributed.PRECISION).write_text('{"mixed_precision": "fp4"}')
    with pytest.raises(UserError, match="measured again"):
        precision(tmp_path, "auto", torch.float32, monkeypatch)
    (tmp_path / distributed.PRECISION).unlink()
    assert precision(tmp_path, "auto", torch.float32, monkeypatch) == "no"


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    installed = {str(name) for name in tracking.get_available_trackers()}
    given = next(each for each in ("wandb", "trackio", "mlflow") if each not in installed)
    config = build(TrainConfig, {"target": "t", "trackers": f"tensorboard,{given}"})
    with pytest.raises(UserError, match=rf"train\.trackers: .* found no {given}\b") as refused:
        distributed.require_trackers(config)
    assert refused.value.code == "tracker-not-installed"
    distributed.require_trackers(build(TrainConfig, {"target": "t", "trackers": "tensorboard"}))


@pytest.mark.parametrize("name", ["micro_batch_tokens", "batch_tokens", "intermediate_size"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_sizes_are_above_zero(name: str, number: str) -> None:
    with pytest.raises(UserError, match=rf"train\.{name}"):
        build(TrainConfig, {"target": "t", name: number})


# A thread of gloo's takes the GIL after the work, as it does to drop tensors; here again and again.
OUTLIVED = """
import atexit, sys, threading, time
from shared.runtime import process
import torch

folder, code = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
atexit.register(print, "a tracker's last words")
is_outlived = threading.Event()

def outlive(_):
    if threading.current_thread() is not threading.main_thread():  # else it was done already
        is_outlived.set()
        while True:
            time.sleep(0.0001)

while not is_outlived.is_set():
    torch.distributed.all_reduce(torch.ones(1 << 20), async_op=True).get_future().then(outlive)
process.expect_threads_to_outlive_the_work()
process.leave(int(code))
"""


@pytest.mark.parametrize("code", [0, 75])
def test_a_thread_of_gloo_that_outlives_the_work_does_not_change_the_exit_code(
    tmp_path: Path, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVED, str(tmp_path), str(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "a tracker's last words\n"
