# SPDX-License-Identifier: Apache-2.0
"""What a training takes of main memory where freed memory stays with the process."""

import subprocess
import sys

from tests.runs import ROOT

# In a process of its own: the setting cannot be taken back.
_PASS = """
import torch
from shared.runtime.processor import keep_freed_memory
from shared.target.tensors import FinalNorm
from stages.train.objective.target_output import CHUNK_ROWS, SharesInVocab, TargetOutput
from tests.perf.read import anonymous_bytes

VOCAB, HIDDEN, CHUNKS = 8192, 16, 240
keep_freed_memory()
torch.manual_seed(0)
whole = TargetOutput(FinalNorm(torch.ones(HIDDEN), 1e-5), torch.randn(VOCAB, HIDDEN))
find = SharesInVocab(whole, torch.arange(VOCAB) % 12 == 0)
shares = []
for chunk in range(CHUNKS):
    shares.append(find(torch.randn(CHUNK_ROWS, HIDDEN)))
    if chunk == 0:
        first = anonymous_bytes()
print(anonymous_bytes() - first)
"""


def test_the_pass_over_the_data_does_not_grow() -> None:
    """A chunk's logits are 8 MiB. Made anew for each, they left room that the next did not fit into."""
    done = subprocess.run(
        [sys.executable, "-c", _PASS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 24 << 20


# Long-lived tensors among short-lived ones, as a step's: the heap keeps the room between them.
_GAPS = """
import ctypes
import torch
from shared.runtime.processor import keep_freed_memory, release_freed_memory
from tests.perf.read import anonymous_bytes

keep_freed_memory()
before = anonymous_bytes()
kept = []
for _ in range(64):
    room = torch.zeros(1 << 20)
    kept.append(torch.zeros(1 << 10))
    del room
    kept.append(torch.zeros(1 << 10))
gaps = [torch.zeros(1 << 20) for _ in range(64)]
del gaps
grown = anonymous_bytes() - before
release_freed_memory()
print(grown, anonymous_bytes() - before)
"""


def test_what_was_kept_goes_back_to_the_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GAPS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    grown, left = map(int, done.stdout.split())
    assert grown > 200 << 20
    assert left < 16 << 20
