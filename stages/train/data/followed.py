# SPDX-License-Identifier: Apache-2.0
"""`train.follow`: dump's shards as dump makes them, and what train tells dump of its progress.

The samples, and so all steps, are known from dump's plan before any state exists. A shard is opened
when the first step needs it, which may wait for dump, and closed when a later step does not.
`shared/artifacts/window.py` has the files that the two stages exchange.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from shared.artifacts import window
from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import MANIFEST, read_manifest
from shared.contracts import hidden_states
from shared.contracts.hidden_states import Shard
from shared.errors import RetryableError, UserError
from shared.runtime.peer import Peer
from shared.runtime.process import stop_if_requested
from stages.train.config import TrainConfig
from stages.train.data.dataset import Sample

_POLL_S = 0.1
_SAVED = "the last step is saved"


class FollowedShards(Sequence[Shard]):
    """dump's shards by their numbers; asking for one waits until dump has made it.

    Args:
        offer: dump's manifest of what it makes.
    """

    @classmethod
    def of(
        cls, config: TrainConfig, offer: dict[str, Any], data_config: dict[str, Any]
    ) -> "FollowedShards | None":
        """Those of the run's dump, or None without `train.follow`."""
        return cls(config, offer, data_config) if config.follow else None

    def __init__(
        self, config: TrainConfig, offer: dict[str, Any], data_config: dict[str, Any]
    ) -> None:
        paths = config.paths
        self._folder, self._offer = paths.stage("dump"), offer
        self.fingerprint = str(offer["fingerprint"])
        self.window_shards = int(offer["facts"]["window_shards"])
        self._num_states = len(data_config["hidden_states"]["layer_ids"])
        self._hidden_size = data_config["model"]["hidden_size"]
        self._peer = Peer(paths.status("dump").parent, "dump", patience_s=config.patience_s)
        self._sample_ids, self._lengths = window.read_rows(self._folder)
        self._open: dict[int, Shard] = {}
        self._stay: set[int] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._cause: BaseException | None = None
        self.waits_for: int | None = None  # the shard that a step waits for

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __getitem__(self, index: Any) -> Any:
        with self._lock:
            shard = self._open.get(index)
        if shard is None:
            shard = self._wait(index)
            with self._lock:
                self._open[index] = shard
        return shard

    def samples(self) -> list[Sample]:
        """All samples of the plan, in its order."""
        found = []
        for index, (names, lengths) in enumerate(zip(self._sample_ids, self._lengths, strict=True)):
            start = 0
            for name, length in zip(names, lengths, strict=True):
                found.append(Sample(name, index, slice(start, start + length)))
                start += length
        return found

    def stay_open(self, indices: Iterable[int]) -> None:
        """Never close these: their samples are walked again and again."""
        self._stay.update(indices)

    def keep(self, samples: Iterable[Sample]) -> None:
        """Open the shards of a step's samples, and close the others.

        A mapped file takes room on the disk even after it was removed.
        """
        needed = dict.fromkeys(sample.shard for sample in samples)
        for index in needed:
            _ = self[index]
        with self._lock:
            for index in self._open.keys() - needed.keys() - self._stay:
                del self._open[index]

    def close(self, cause: BaseException | None = None) -> None:
        """Have no thread wait any longer; what waits raises `cause`."""
        self._cause = self._cause or cause
        self._is_closed = True

    def ending_waits(self) -> contextlib.ExitStack:
        """A block that makes a batch: if it fails, no other one waits for a shard behind it.

        The loop hears of a failure only when the threads have ended, and dump may wait for the loop.
        """
        stack = contextlib.ExitStack()
        stack.push(self._close_if_failed)
        return stack

    def _close_if_failed(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is not None:
            self.close(error)
        return False

    def _wait(self, index: int) -> Shard:
        """The shard, once it is whole.

        Raises:
            UserError: it is damaged, or dump has finished without it.
            RetryableError: dump is gone, or makes something else now.
            Stopped: a signal asked for it.
        """
        while (entries := window.whole_shard(self._folder, index)) is None:
            self.waits_for = index
            stop_if_requested(_SAVED)
            if self._is_closed:
                raise self._cause or RetryableError("training has ended.", code="training-ended")
            self._require_dump(index)
            time.sleep(_POLL_S)
        self.waits_for = None
        name = hidden_states.shard_name(index)
        require_unchanged(self._folder, {**self._offer, "files": entries}, [name])
        shard = hidden_states.read_shard(
            self._folder / name, num_states=self._num_states, hidden_size=self._hidden_size
        )
        if shard.sample_ids != self._sample_ids[index]:
            raise UserError(
                f"{self._folder / name}: expected the samples that {window.ROWS} lists, found others.",
                code="window-other-samples",
                remedy="Run dump and train again with --overwrite.",
                facts={"shard": index},
            )
        return shard

    def _require_dump(self, index: int) -> None:
        found = read_manifest(self._folder, window.OFFER)
        told = ("fingerprint", "facts")
        if found is None or any(found[key] != self._offer[key] for key in told):
            raise RetryableError(
                f"{self._folder / window.OFFER}: dump was started with other settings meanwhile.",
                code="window-changed",
                remedy="Run the same command again: training continues.",
            )
        if not (self._folder / MANIFEST).exists():
            self._peer.require()
        elif window.whole_shard(self._folder, index) is None:
            raise UserError(
                f"{self._folder}: dump is finished, and shard {index} was removed, since an earlier "
                "checkpoint of train covered it.",
                code="window-shard-removed",
                remedy="Run dump again with --overwrite, and train beside it.",
                facts={"shard": index},
            )


class Visits:
    """Which shards the steps read, in order, and when a checkpoint lets dump remove some.

    Worked example, steps with the shards [[0, 2], [2], [2, 1], [1]], of which 0 stays: the order is
    [2, 1], the steps' first visits are [0, 0, 0, 1], and 2 after the last.

    Args:
        stay: shards with held-out samples.
        window_shards: how many dump keeps at a time, those that stay included.
    """

    def __init__(
        self, steps: Iterable[list[Sample]], stay: Iterable[int], window_shards: int
    ) -> None:
        self.kept, self.order = sorted(set(stay)), list[int]()
        room = window_shards - len(self.kept)
        staying, first, widest = set(self.kept), list[int | None](), 1
        for samples in steps:
            seen: list[int] = []
            for sample in samples:
                if sample.shard in staying:
                    continue
                if not self.order or self.order[-1] != sample.shard:
                    self.order.append(sample.shard)
                seen.append(len(self.order) - 1)
            first.append(seen[0] if seen else None)
            widest = max(widest, seen[-1] - seen[0] + 1 if seen else 1)
        self._first = [len(self.order)]
        for visit in reversed(first):
            self._first.append(self._first[-1] if visit is None else visit)
        self._first.reverse()
        self._save_every = max(1, room // 2)
        if widest > room - self._save_every + 1:
            # Dump would wait for a checkpoint, and the step for dump.
            needed = next(n for n in itertools.count(1) if widest <= n - max(1, n // 2) + 1)
            raise UserError(
                f"dump.window_shards: one step reads up to {widest} shards, and {len(self.kept)} with "
                f"held-out samples stay: expected at least {len(self.kept) + needed}, found "
                f"{window_shards}.",
                code="window-too-small",
                remedy="Raise dump.window_shards or dump.shard_bytes, or lower train.batch_tokens.",
                facts={"shards_per_step": widest, "kept": len(self.kept)},
            )

    def frees(self, saved_step: int, step: int) -> bool:
        """Whether a checkpoint of `step`, the first after `saved_step`, frees half of the window."""
        return self._first[step] - self._first[saved_step] >= self._save_every

    def reading(self, step: int, dump: str) -> window.Reading:
        """What to tell dump once the checkpoint of `step` (-1: the last) is on the disk."""
        return window.Reading(dump, self.kept, self.order, self._first[step])
