# SPDX-License-Identifier: Apache-2.0
"""One side of the benchmark in a process of its own: `python -m tests.perf.worker SIDE SHAPE DTYPE`.

It answers lines of JSON on stdin with lines of JSON on stdout, so that the driver can take turns
between processes whose allocators were set up differently:

    {"do": "step", "share": 0.6}          one whole step, optimizer included -> {"ms": ...}
    {"do": "memory", "share": 0.6}        -> {"mib": what a step adds at its peak}
    {"do": "gradients", "share": 0.6, "to": PATH}   one forward and backward -> {"loss": ...}
    {"do": "gemm"}                        -> {"gflops": rate of a matrix product}
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


def _make(side: str, shape: Shape, dtype: torch.dtype, without: str) -> Side:
    if side == "ours":
        from tests.perf.ours import Ours

        return Ours(shape, dtype, without)
    from tests.perf.peer import Speculators

    return Speculators(shape, dtype)


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _memory(run: Callable[[], None], clear: Callable[[], None]) -> float:
    """Peak resident MiB of `run` over what is resident before it, optimizer state included."""
    clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def gemm_gflops(shape: Shape, dtype: torch.dtype, *, repeats: int = 3) -> float:
    """The rate of lm_head's product at 60 % of the rows, the largest of the step; its best run."""
    rows = shape.tokens * 6 // 10
    left = torch.randn(rows, shape.hidden, dtype=dtype)
    right = torch.randn(shape.hidden, shape.draft_vocab, dtype=dtype)
    out = torch.empty(rows, shape.draft_vocab, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * shape.hidden * shape.draft_vocab / min(seconds[1:]) / 1e9


def _answer(side: Side, shape: Shape, dtype: torch.dtype, request: dict[str, Any]) -> Any:
    share = request.get("share", 0.6)
    if request["do"] == "step":
        started = time.perf_counter()
        side.step(share)
        return {"ms": (time.perf_counter() - started) * 1e3}
    if request["do"] == "memory":
        return {"mib": _memory(lambda: side.step(share), side.clear)}
    if request["do"] == "gradients":
        loss, gradients = side.gradients(share)
        torch.save(gradients, request["to"])
        side.clear()
        return {"loss": loss}
    return {"gflops": gemm_gflops(shape, dtype)}


def main() -> None:
    name, shape_name, dtype_name, threads, *without = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape, dtype = SHAPES[shape_name], getattr(torch, dtype_name)
    side = _make(name, shape, dtype, without[0] if without else "")
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(side, shape, dtype, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
