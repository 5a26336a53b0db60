# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, on a CPU, against the plain versions in float64.

The interpreter is chosen when a kernel is declared, so the checks run in a process of their own.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.runs import ROOT

# Drawn shapes of each kernel, in both dtypes; tests/stages/train/test_triton_shapes.py draws the others.
QUICK_SHAPES = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


def test_kernels_agree_with_the_reference() -> None:
    run_in_interpreter(0, QUICK_SHAPES)


def run_in_interpreter(first: int, last: int) -> None:
    """Fail if a kernel is off for one of the drawn shapes first .. last - 1."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    module = "tests.quick.train.kernels.test_triton"
    done = subprocess.run(
        # The padding rows of a tile are 0 / 0 in the interpreter, as on a card.
        [sys.executable, "-W", "ignore::RuntimeWarning", "-m", module, str(first), str(last)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the error, as a share of the norm of `expected`, or of 1 if that is less.

    Where `expected` is zero, as the queries' gradient is where each row sees one key, there is nothing
    to take a share of: the largest error of an element, whose addends are about 1.
    """
    error = found.double() - expected
    if error.numel() and not expected.any():
        return float(error.abs().max())
    return float(error.norm() / expected.norm().clamp(min=1.0))


def excess(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """How much further the kernel is from float64 than the plain version in the same dtype."""
    triples = zip(found, plain, exact, strict=True)
    return max(distance(ours, best) - distance(theirs, best) for ours, theirs, best in triples)


def check_attention(seed: int, dtype: torch.dtype) -> float:
    """One drawn shape: the largest excess error of output and gradients."""
    from stages.train.kernels.attention import ChainAttention
    from stages.train.kernels.blocks import attention_blocks, narrowed, narrowed_starts
    from stages.train.kernels.fused import FusedChainAttention

    draw = random.Random(seed)
    torch.manual_seed(seed)
    # Tiles have 16 to 64 rows and keys.
    lengths = [draw.choice([0, 1, 1, 2, 7, 40, 70]) for _ in range(draw.randint(1, 4))]
    share = draw.choice([0.0, 0.3, 1.0]) if seed % 10 else 0.0  # some documents have no slot
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    slots = (torch.rand(total) < share).nonzero().flatten()
    kv_heads, groups = draw.choice([1, 2]), draw.choice([1, 2, 3, 4])
    size, members = draw.choice([1, 2, 7, 8, 16, 24, 33, 40, 64, 80]), draw.randint(0, 4)
    shapes = [(len(slots), kv_heads * groups, size), *[(total, kv_heads, size)] * 2]
    shapes += [(len(slots), kv_heads, size)] * (2 * members)
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    grad = torch.randn(shapes[0]).to(dtype)
    starts = offsets[torch.bucketize(slots, offsets, right=True) - 1]
    blocks = attention_blocks(slots, offsets)
    if seed % 3 == 0:
        reach = draw.choice([1, 5, 64])
        blocks, starts = narrowed(blocks, slots, reach), narrowed_starts(starts, slots, reach)

    def run(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        if fused:
            out = FusedChainAttention.apply(*own[:3], slots.int(), starts.int(), *own[3:])
        else:
            out = ChainAttention.apply(*own[:3], blocks, *own[3:])
        return [out.detach(), *torch.autograd.grad(out, own, grad.to(dtype))]

    return excess(run(True, dtype), run(False, dtype), run(False, torch.float64))


def check_loss(seed: int, dtype: torch.dtype) -> float:
    """One drawn shape: the largest excess error of losses and gradients; hits must be equal."""
    from stages.train.kernels.fused import LOSSES, loss_rows
    from stages.train.objective.cross_entropy import _rows

    draw = random.Random(seed)
    torch.manual_seed(seed)
    columns, targets = draw.choice([1, 5, 64, 100, 300, 2500]), draw.choice([0, 1, 3, 6])
    hidden, steps = 8, draw.randint(1, 5)
    scale, cap = draw.choice([1.0, 0.25]), draw.choice([None, 5.0])
    loss = LOSSES[seed % len(LOSSES)]
    finals = torch.randn(targets, hidden, dtype=torch.float64)
    head = torch.randn(columns, hidden, dtype=torch.float64)
    products = (finals @ head.t()).to(dtype)
    scores = torch.randn(steps, targets, columns).to(dtype) * 3
    shares = torch.rand(targets)

    def plainly(dtype: torch.dtype) -> Any:
        given = _Given(products.to(dtype), scale, cap)
        return _rows(scores.to(dtype, copy=True), finals, given, loss, shares)

    exact, plain = plainly(torch.float64), plainly(torch.float32)
    losses, hits = loss_rows(products, scores, shares, scale, cap or 0.0, loss)
    assert torch.equal(hits, exact[1])
    gradient = plain[2].to(dtype)
    return excess((losses, scores), (plain[0], gradient), (exact[0], exact[2]))


class _Given:
    """A target whose products are given."""

    def __init__(self, products: Tensor, scale: float, cap: float | None) -> None:
        self.given = products * scale
        self.cap = cap

    def logits(self, _: Tensor) -> Any:
        return self.given if self.cap is None else self.cap * torch.tanh(self.given / self.cap)


def main(first: int, last: int) -> None:
    for check in (check_attention, check_loss):
        for dtype, limit in TOLERANCE.items():
            found = {seed: check(seed, dtype) for seed in range(first, last)}
            worst = max(found, key=lambda seed: found[seed])
            sys.stdout.write(f"{check.__name__} {dtype}: {found[worst]:.2e} at shape {worst}\n")
            if not found[worst] <= limit:
                sys.exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
