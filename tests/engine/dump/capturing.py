# SPDX-License-Identifier: Apache-2.0
"""What the capture tests share: rows of random ids, an engine's settings, and its answers."""

import random
from pathlib import Path
from typing import Any

import torch

from stages.dump.backends.base import Row
from stages.dump.backends.hf import HfCapture
from tests.models import VOCAB_SIZE

AUX_LAYERS = (2, 4, 5)
NUM_LAYERS = 8
# The targets' own limit too: the longest row has no position to spare.
MAX_LENGTH_TOKENS = 256
# Rows that are asked for their log-probabilities: one token, one chunk, three chunks of 96.
PROBES = (0, 4, 7)
LENGTHS = (1, 2, 5, 17, 64, 130, 200, 256, 99, 3, 255, 31)


def make_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def settings(target: Path, aux_layers: tuple[int, ...] = AUX_LAYERS) -> dict[str, Any]:
    return {
        "target": target,
        "aux_layers": aux_layers,
        "num_layers": NUM_LAYERS,
        "max_length_tokens": MAX_LENGTH_TOKENS,
    }


def capture_hf(target: Path, aux_layers: tuple[int, ...] = AUX_LAYERS) -> dict[int, torch.Tensor]:
    with HfCapture(**settings(target, aux_layers), max_num_batched_tokens=600) as capture:
        return answers(capture)[0]


def answers(capture: Any) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """row -> states, and row -> log-probabilities of the rows of `PROBES`, as `capture` says."""
    states, logprobs = {}, {}
    for captured in capture.run([Row(ids, i in PROBES) for i, ids in enumerate(make_rows())]):
        states[captured.row] = captured.states.clone()
        if captured.logprobs is not None:
            logprobs[captured.row] = captured.logprobs
    return states, logprobs
