# SPDX-License-Identifier: Apache-2.0
"""vLLM's synthetic rejection sampling on the CPU, for a process that has this folder on PYTHONPATH.

vLLM's own kernel is Triton's; the C++ one that replaces it on the CPU asserts that the synthetic mode is off.
Only that one kernel is filled in here, from the Triton kernel's semantics: position i is accepted
where its uniform draw lies under the conditional rate, all else (rates, draws, scheduler, counters)
is vLLM's.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "vllm.utils.cpu_triton_utils"
KERNEL = "_rejection_greedy_sample_kernel_impl"


def fill_in(module: ModuleType) -> None:
    original = getattr(module, KERNEL)

    def kernel(
        output_token_ids: Any,
        cu_num_draft_tokens: Any,
        draft_token_ids: Any,
        target_argmax: Any,
        bonus_token_ids: Any,
        is_greedy: Any,
        max_spec_len: int,
        uniform_probs: Any = None,
        synthetic_conditional_rates: Any = None,
        SYNTHETIC_MODE: bool = False,  # noqa: N803 - the kernel's own name
    ) -> None:
        if not SYNTHETIC_MODE:
            original(
                output_token_ids,
                cu_num_draft_tokens,
                draft_token_ids,
                target_argmax,
                bonus_token_ids,
                is_greedy,
                max_spec_len,
            )
            return
        start = 0
        for row, end in enumerate(cu_num_draft_tokens.tolist()):
            for position, token in enumerate(range(start, end)):
                draft = int(draft_token_ids[token])
                rate = float(synthetic_conditional_rates[position])
                accepted = float(uniform_probs[token]) < rate and draft >= 0
                output_token_ids[row, position] = draft if accepted else int(target_argmax[token])
                if not accepted:
                    break
            else:
                output_token_ids[row, end - start] = bonus_token_ids.flatten()[row]
            start = end

    setattr(module, KERNEL, kernel)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_fill_in(module: ModuleType) -> None:
                load(module)
                fill_in(module)

            spec.loader.exec_module = load_and_fill_in  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
