# SPDX-License-Identifier: Apache-2.0
"""What train stands on: a finished dump, or what a dump beside it offers (`train.follow`)."""

import importlib
import time
from typing import Any

from shared.artifacts.manifest import read_manifest, require_parent
from shared.artifacts.window import OFFER
from shared.errors import UserError
from shared.runtime.peer import Peer
from shared.runtime.process import stop_if_requested
from stages.train.config import TrainConfig

_POLL_S = 0.1


def require_dump(config: TrainConfig) -> dict[str, Any]:
    """The manifest of the dump; with `train.follow` it may take a while until there is one.

    Raises:
        UserError: no finished dump, one of other settings, or one that kept only its last shards.
        RetryableError: no dump is at work to follow.
        Stopped: a signal asked for it.
    """
    folder = config.paths.stage("dump")
    if config.follow:
        peer = Peer(config.paths.status("dump").parent, "dump", patience_s=config.patience_s)
        if read_manifest(folder, OFFER) is None:
            # Takes seconds, in which dump starts and plans.
            importlib.import_module("stages.train.loop.trainer")
        while read_manifest(folder, OFFER) is None:
            stop_if_requested("training was not begun")
            peer.require()
            time.sleep(_POLL_S)
        return require_parent(folder, stage="dump", config=config, name=OFFER)
    parent = require_parent(folder, stage="dump", config=config)
    if (folder / OFFER).exists():
        raise UserError(
            f"{folder}: expected a dump with all its shards, found one with a window: it keeps only "
            "its last shards.",
            code="dump-has-window",
            remedy="Set train.follow: true, or run dump again without window_shards and with "
            "--overwrite.",
            facts={"dump": str(folder)},
        )
    return parent
