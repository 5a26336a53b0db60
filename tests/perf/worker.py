# SPDX-License-Identifier: Apache-2.0
"""One side of the benchmark in a process of its own.

    python -m tests.perf.worker SIDE SHAPE DTYPE THREADS DEVICE [PART]

It answers lines of JSON on stdin with lines of JSON on stdout, so that the driver can take turns
between processes whose allocators were set up differently:

    {"do": "step", "share": 0.6}          one whole step, optimizer included -> {"ms": ...}
    {"do": "memory", "share": 0.6}        -> {"mib": what a step adds at its peak, "whole_mib": the peak}
    {"do": "gradients", "share": 0.6, "to": PATH}   one forward and backward -> {"loss": ...}
    {"do": "gemm"}                        -> {"gflops": rate of lm_head's product}
    {"do": "square", "size": 8192}        -> {"gflops": rate of a square product}
    {"do": "profile", "share": 0.6}       -> {"kernels": the ten that take longest, ...}
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from tests.perf.problem import SHAPES, Shape


class Side(Protocol):
    """A trainer with the problem loaded."""

    def step(self, share: float) -> None: ...

    def gradients(self, share: float) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss of design section 4, and its gradients by the exported names."""

    def clear(self) -> None:
        """Let go of the gradients."""


def _make(side: str, shape: Shape, dtype: torch.dtype, device: torch.device, without: str) -> Side:
    if side == "ours":
        from tests.perf.ours import Ours

        return Ours(shape, dtype, device, without)
    from tests.perf.peer import Speculators

    return Speculators(shape, dtype, device)


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _memory(
    run: Callable[[], None], clear: Callable[[], None], device: torch.device
) -> dict[str, float]:
    """Peak MiB of `run`, over what is held before it and whole; on a CPU the resident set's."""
    clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        run()
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _resident("VmRSS")
        run()
        peak = _resident("VmHWM")
    return {"mib": peak - before, "whole_mib": peak}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, to the end of what it started on the device."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_gflops(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The rate of a matrix product, its best run."""
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(inner, columns, dtype=dtype, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    repeats = 4 if device.type == "cpu" else 20
    seconds = [_seconds(lambda: torch.mm(left, right, out=out), device) for _ in range(repeats)]
    return 2 * rows * inner * columns / min(seconds[1:]) / 1e9


def gemm_gflops(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The rate of lm_head's product at 60 % of the rows, the largest of the step."""
    rows = shape.tokens * 6 // 10
    return product_gflops(rows, shape.hidden, shape.draft_vocab, dtype, device)


def profile(run: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """The ten kernels (on a CPU: operators) that take longest, how many there are, and all their time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    found = []
    for event in profiler.key_averages():
        if device.type == "cpu":
            us = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            us = event.self_device_time_total
        else:
            continue
        found.append({"name": event.key[:90], "ms": round(us / 1e3, 3), "calls": event.count})
    found.sort(key=lambda kernel: -kernel["ms"])
    return {
        "kernels": found[:10],
        "launches": sum(kernel["calls"] for kernel in found),
        "busy_ms": round(sum(kernel["ms"] for kernel in found), 2),
    }


def _answer(
    side: Side, shape: Shape, dtype: torch.dtype, device: torch.device, request: dict[str, Any]
) -> Any:
    share = request.get("share", 0.6)

    def step() -> None:
        side.step(share)

    if request["do"] == "step":
        return {"ms": _seconds(step, device) * 1e3}
    if request["do"] == "memory":
        return _memory(step, side.clear, device)
    if request["do"] == "profile":
        return profile(step, device)
    if request["do"] == "square":
        size = request["size"]
        return {"gflops": product_gflops(size, size, size, dtype, device)}
    if request["do"] == "gradients":
        loss, gradients = side.gradients(share)
        torch.save(gradients, request["to"])
        side.clear()
        return {"loss": loss}
    return {"gflops": gemm_gflops(shape, dtype, device)}


def main() -> None:
    name, shape_name, dtype_name, threads, device_name, *without = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape, dtype, device = SHAPES[shape_name], getattr(torch, dtype_name), torch.device(device_name)
    side = _make(name, shape, dtype, device, without[0] if without else "")
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        answer = _answer(side, shape, dtype, device, json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
