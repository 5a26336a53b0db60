# SPDX-License-Identifier: Apache-2.0
"""A training that reads shards while dump makes them: what ends its waiting."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts import window
from shared.errors import UserError
from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.data.followed import FollowedShards
from stages.train.data.loader import prefetched


def test_what_fails_in_one_batch_ends_the_waiting_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else dump waits for the loop, the loop for its threads, and a thread for dump."""
    monkeypatch.setattr(FollowedShards, "_require_dump", lambda *_: None)  # it is at work
    config = build(TrainConfig, {"target": "t", "workspace": str(tmp_path), "follow": "true"})
    config.paths.stage("dump").mkdir(parents=True)
    window.write_rows(config.paths.stage("dump"), [["a"], ["b"]], [[4], [4]])
    offer: dict[str, Any] = {"fingerprint": "f", "facts": {"window_shards": 2}}
    described: dict[str, Any] = {"hidden_states": {"layer_ids": [2]}, "model": {"hidden_size": 8}}
    followed = FollowedShards(config, offer, described)
    late = threading.Timer(60, followed.close)
    late.start()

    def make(index: int) -> Any:
        with followed.ending_waits():
            if index == 0:
                raise UserError("the disk is full", code="no-space", remedy="")
            return index < 0 or followed[index]

    batches = prefetched(iter([-1, 0, 1]), make)
    assert next(batches)
    while followed.waits_for is None:  # the last one's thread
        time.sleep(0.01)
    with pytest.raises(UserError, match="the disk is full"):
        next(batches)
    assert late.is_alive()
    late.cancel()
