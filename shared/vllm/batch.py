# SPDX-License-Identifier: Apache-2.0
"""How many requests a vLLM server should answer at once, by the memory of one of its GPUs."""

_GIB = 1 << 30
# (GiB of a GPU from which on, requests). vLLM's own largest batch is 256, and 1,024 from 70 GiB on; so
# many long answers would not fit, and vLLM would begin some of them again. Chosen, not measured.
_REQUESTS = ((70, 512), (40, 256))
FEWEST_REQUESTS = 64


def requests_in_flight(gpu_bytes: int) -> int:
    """Requests for a server on GPUs of this memory; 0 stands for a CPU.

    Worked example: an L4 (22.5 GiB) takes 64, an A100 of 40 GiB 256, an H100 (79.6 GiB) 512.
    """
    enough = (requests for gib, requests in _REQUESTS if gpu_bytes >= gib * _GIB)
    return next(enough, FEWEST_REQUESTS)
