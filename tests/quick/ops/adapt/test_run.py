# SPDX-License-Identifier: Apache-2.0
"""What decides between the old head and the new one."""

import json
from pathlib import Path

import pytest
import torch

from shared.contracts.head_folder import read_head
from shared.contracts.hidden_states import TOKEN_FREQ
from shared.paths import RunPaths
from stages.ops.adapt.run import _compare, _vocabulary_shares
from tests.heads import write_random_head
from tests.models import tiny_llama


@pytest.mark.parametrize(("after", "improved"), [(2.05, True), (2.03, False), (1.9, False)])
def test_a_gain_of_less_than_was_asked_for_is_none(
    tmp_path: Path, after: float, improved: bool
) -> None:
    runs = {"old": 2.0, "new": after}
    for name, length in runs.items():
        head = {"acceptance_length": length, "acceptance_length_interval": [length, length]}
        path = RunPaths(tmp_path, name).report
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"head": {"acceptance": head, "tokens_per_s": 10 * length}}))
    found = _compare(RunPaths(tmp_path, "old"), RunPaths(tmp_path, "new"), 0.02)
    assert found["improved"] is improved
    assert (found["before"], found["after"]) == (2.0, after)
    assert found["after_tokens_per_s"] == 10 * after


def test_the_share_of_the_new_answers_that_each_vocabulary_holds(tmp_path: Path) -> None:
    target, run = tiny_llama(tmp_path / "tiny"), RunPaths(tmp_path, "new")
    write_random_head(tmp_path / "old", target=target, draft_vocab_size=128, aux_layers=(1, 3, 5))
    write_random_head(run.export, target=target, aux_layers=(1, 3, 5))  # all tokens: no d2t
    old = read_head(tmp_path / "old")
    d2t = old.tensor("d2t")
    assert d2t is not None
    own = (d2t + torch.arange(128)).tolist()
    counts = torch.zeros(512, dtype=torch.int64)
    counts[own[5]] = 3
    counts[next(i for i in range(512) if i not in own)] = 1
    run.stage("dump").mkdir(parents=True)
    torch.save(counts, run.stage("dump") / TOKEN_FREQ)
    found = _vocabulary_shares(old, run)
    assert found == {"vocabulary_share_before": 0.75, "vocabulary_share_after": 1.0}
