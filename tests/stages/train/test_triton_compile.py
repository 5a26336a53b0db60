# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for cards that are not there: types, product shapes, shared memory.

The interpreter knows none of these. Compiling stops at PTX, before the assembler. What a card of a
generation may use in shared memory is in CUDA's programming guide; of capability 8.x it is that of 8.6,
the least.
"""

from typing import Any

import pytest
import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from stages.train.kernels import triton_attention, triton_loss
from stages.train.kernels.fused import LOSSES

SHARED_KIB = {75: 64, 80: 99, 90: 227, 100: 227}
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
IN_FLOAT32 = {"out", "lse", "delta", "losses", "shares"}
NUM_QUERY_HEADS, NUM_KEY_HEADS = 8, 2


def argument_type(name: str, dtype: torch.dtype) -> str:
    if name.startswith("num_"):
        return "i32"
    if name in ("slots", "starts", "first_rows", "last_rows"):
        return "*i32"
    if name in ("scale", "logit_scale", "softcap", "factor", "tiny"):
        return "fp32"
    return "*i1" if name == "hits" else "*fp32" if name in IN_FLOAT32 else NAMES[dtype]


def shared_kib(
    kernel: Any, constants: dict[str, Any], dtype: torch.dtype, capability: int, stages: int = 3
) -> float:
    """Shared memory of the kernel, compiled to PTX for a card of that capability."""
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {
        name: "constexpr" if name in constants else argument_type(name, dtype)
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_stages": stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *functions, context)
    steps: dict[str, Any] = {}
    backend.add_stages(steps, options, source.language)
    found: dict[str, Any] = {}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = steps[name](module, found)
    assert ".entry" in module
    return found["shared"] / 1024


@pytest.mark.parametrize(
    ("capability", "size", "dtype"),
    [
        (80, 128, torch.bfloat16),
        (80, 256, torch.bfloat16),
        (90, 64, torch.bfloat16),
        (100, 128, torch.bfloat16),
        (75, 128, torch.float32),
        (80, 80, torch.float32),  # padded
    ],
)
def test_attention_compiles_and_fits(capability: int, size: int, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        query = torch.empty(1, NUM_QUERY_HEADS, size, dtype=dtype)
        key = torch.empty(1, NUM_KEY_HEADS, size, dtype=dtype)
    constants = triton_attention.constants_of(query, key)
    stages = constants.pop("num_stages")
    constants |= {"N": constants["M"], "K": 3, "EXACT": dtype == torch.float32}
    kernels = ("_forward", "_backward_rows", "_backward_keys", "_backward_chain")
    for kernel in (getattr(triton_attention, name) for name in kernels):
        used = shared_kib(kernel, constants, dtype, capability, stages)
        assert used <= SHARED_KIB[capability], f"{kernel.__name__} takes {used} KiB"


@pytest.mark.parametrize("loss", [0, LOSSES.index("lk_hybrid")])
def test_the_loss_compiles_and_fits(loss: int) -> None:
    constants = {"K": 3, "B": triton_loss.COLUMNS, "CAPPED": True, "LOSS": loss}
    assert shared_kib(triton_loss._rows, constants, torch.bfloat16, 90) <= SHARED_KIB[75]
