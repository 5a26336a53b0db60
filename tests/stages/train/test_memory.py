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
