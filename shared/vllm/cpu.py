# SPDX-License-Identifier: Apache-2.0
"""How a vLLM engine of one rank is best started on a CPU of a few cores."""

import os
from collections.abc import Iterable, Mapping

ONE_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_MAX_CPUS = 8  # beyond, threads that are bound to cores are worth more than a quick start
_BINDING = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def starts_in_one_process(ranks: Iterable[int | None], variables: Mapping[str, str]) -> bool:
    """Whether an engine on a CPU should have its worker in its own process.

    vLLM makes the executor "mp" of "uni" there, and its worker is one more process that imports
    everything anew: a quarter of an engine's start. Named by its path, the executor stays what it is on
    one GPU. It binds no threads to cores: a machine of many, or an operator who binds, is left alone.

    Args:
        ranks: the engine's sizes in each kind of parallelism; None where it is not set.
        variables: the environment that the engine gets.
    """
    is_one_rank = all(size in (None, 1) for size in ranks)
    return is_one_rank and num_cpus() <= _MAX_CPUS and not any(n in variables for n in _BINDING)
