# SPDX-License-Identifier: Apache-2.0
"""Several processes, on one node or many, that make one artifact in one folder, without a merge.

Each process does the shards that it owns, and writes each under the name that it would have in any
case, so a shard done twice is the same shard. Whoever finds all shards whole completes the artifact,
alone. A stage that can be shared out does, between `is_done` and `finish`:

    with artifact.work() as is_needed:      # its own share is locked, the folder is held together
        for shard in plan:                  # the same plan in every process: from the input alone
            if config.share.owns(shard.index) and not is_whole(shard):
                write(shard)
        if all(map(is_whole, plan)):        # looked at after the own share was written
            with artifact.finishing() as mine:
                if mine:
                    artifact.finish(...)

A process that is not the last leaves with exit code 0 and no manifest. Any of them, run again,
completes what is missing of its own share, and the artifact if that was all.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pydantic

from shared.artifacts.unfinished import LOCK
from shared.config import StageConfig, number_from, operational
from shared.runtime.process import Share, lock

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"


class ShardedConfig(StageConfig):
    """A stage whose work several processes can share, as an Indexed Job of Kubernetes does."""

    shard_index: int | None = operational(
        None, f"Which part of num_shards is this process's, from 0; else ${INDEX_VARIABLE}.", ge=0
    )
    num_shards: int = operational(1, "Processes that share the work of this stage.", ge=1)

    @pydantic.model_validator(mode="after")
    def _index_is_a_part(self) -> "ShardedConfig":
        index = self.share.index
        if index >= self.num_shards:
            raise ValueError(
                f"shard_index {index} needs num_shards of at least {index + 1}, found "
                f"{self.num_shards} (without the flag, the index is ${INDEX_VARIABLE})"
            )
        return self

    @property
    def share(self) -> Share:
        given = self.shard_index
        if given is None:
            if self.num_shards > 1 and not os.environ.get(INDEX_VARIABLE):
                raise ValueError(
                    f"num_shards is {self.num_shards}: give --shard_index or ${INDEX_VARIABLE}"
                )
            given = number_from(INDEX_VARIABLE)
        return Share(given, self.num_shards)


@contextlib.contextmanager
def hold_share(folder: Path, share: Share) -> Iterator[None]:
    """Hold `folder` together with the others at work on it, and `share` of it alone.

    Raises:
        RetryableError: another process works on this share, alone in the folder, or on a share of
            another count.
    """
    with lock(folder / LOCK, alone=False):
        _refuse_other_counts(folder, share.count)
        with lock(folder / f"{LOCK}-{share.index}-of-{share.count}"):
            yield


def _refuse_other_counts(folder: Path, count: int) -> None:
    """Nobody may be at work on a share of another count: shares would overlap.

    Raises:
        RetryableError: somebody is.
    """
    for path in folder.glob(f"{LOCK}-*-of-*"):
        if not path.name.endswith(f"-of-{count}"):
            with lock(path):
                pass
