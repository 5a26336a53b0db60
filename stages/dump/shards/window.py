# SPDX-License-Identifier: Apache-2.0
"""`dump.window_shards`: shards in the order in which train reads them, and never more than so many.

Train says in `reading.json` which shards it wants and how far its last checkpoint is
(`shared/artifacts/window.py`). Everything here follows from that file and from what lies in the
folder, so a killed dump has nothing to remember:

- shards with held-out samples come first and stay;
- the shard of visit v is made when the last checkpoint is fewer than W visits behind;
- before a shard is made, some of those go that the checkpoint covers and the next W visits do not
  need, as many as must: those that were read longest ago.

W is `window_shards` less the shards that stay. Sidecars stay too: they hold the results of the checks.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.artifacts import window
from shared.artifacts.checksums import first_changed
from shared.artifacts.manifest import read_manifest
from shared.artifacts.unfinished import LOCK
from shared.artifacts.window import Reading
from shared.contracts import hidden_states
from shared.errors import UserError
from shared.io import files
from shared.runtime.log import Every
from shared.runtime.peer import Peer
from shared.runtime.process import lock, stop_if_requested
from shared.runtime.status import Status
from stages.dump.config import DumpConfig
from stages.dump.job import Job
from stages.dump.plan import Plan, ShardPlan
from stages.dump.shards.metadata import METADATA, write_metadata
from stages.dump.shards.writer import read_sidecar, read_sidecar_file

_POLL_S = 0.1
_TELL_EVERY_S = 2.0

logger = logging.getLogger(__name__)


def offer(job: Job, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Tell train what will be here: a manifest beside the states' description, written once.

    Args:
        facts: of the artifact's manifest that are known before any state is.
    """
    folder, artifact = job.folder, job.artifact
    facts = {**facts, "window_shards": job.config.window_shards}
    with lock(folder / f"{LOCK}-window", wait=True):
        found = read_manifest(folder, window.OFFER)
        if (
            found is not None
            and found["fingerprint"] == artifact.fingerprint
            and found["facts"] == facts
            and first_changed(folder, found) is None
        ):
            return
        planned = [{"tokens": shard.tokens, "failed": []} for shard in plan.shards]
        write_metadata(job, plan, planned)
        rows = [shard.read() for shard in plan.shards]
        window.write_rows(
            folder,
            [each.sample_ids for each in rows],
            [[len(ids) for ids in each.input_ids] for each in rows],
        )
        artifact.finish(
            [*METADATA, window.ROWS],
            counts=plan.counts,
            facts=facts,
            engine=plan.backend,
            name=window.OFFER,
        )


class Window:
    """What to capture next, in one process of dump."""

    def __init__(
        self, folder: Path, config: DumpConfig, plan: Plan, fingerprint: str, status: Status
    ) -> None:
        self.folder, self.config, self.plan, self.fingerprint = folder, config, plan, fingerprint
        self._train = config.paths.stage("train")
        self._peer = Peer(
            config.paths.status("train").parent, "train", patience_s=config.patience_s
        )
        self._status = status
        self._due = Every(_TELL_EVERY_S)
        self._being_made: set[int] = set()  # begun by this process; without a sidecar not ended yet
        self._seen: set[int] = set()  # shards whose sidecar was read and fits

    def groups(self, check: Callable[[], None]) -> Iterator[Iterator[ShardPlan]]:
        """Shards to capture, grouped: a group goes on for as long as there is room.

        Args:
            check: raises what went wrong with a shard that is being written.

        Raises:
            UserError: the window is smaller than the shards that stay.
            RetryableError: train is gone.
            Stopped: a signal asked for it.
        """
        while True:
            reading = self._reading()
            if (shard := self._next(reading)) is not None:
                yield self._group(shard)
            elif reading is not None and self._is_last(reading):
                return
            else:
                check()
                stop_if_requested("every whole shard is saved")
                self._peer.require()
                self.tell(reading, waits_for="train")
                time.sleep(_POLL_S)

    def tell(self, reading: Reading | None = None, **facts: str) -> None:
        """Show in the status how far it is, and how full the window is."""
        if not self._due():  # asked at every row, and this reads files
            return
        reading = reading or self._reading()
        present = sum(1 for _ in self.folder.glob("shard_*.pt"))
        facts = {"window": f"{present}/{self.config.window_shards}", **facts}
        if reading is None:
            self._status.progress(0, self.plan.tokens, "tokens", **facts)
            return
        tokens = [shard.tokens for shard in self.plan.shards]
        ahead = [*reading.kept, *reading.order[reading.next : self._end(reading)]]
        done = sum(tokens[i] for i in reading.order[: reading.next])
        done += sum(tokens[i] for i in ahead if self._is_whole(i))
        total = sum(tokens[i] for i in (*reading.kept, *reading.order))
        self._status.progress(done, total, "tokens", **facts)

    def missing(self) -> list[int]:
        """Shards that train still needs and that are not whole; all if train has said nothing."""
        reading = self._reading()
        if reading is None:
            return [shard.index for shard in self.plan.shards]
        needed = dict.fromkeys([*reading.kept, *reading.order[reading.next :]])
        return [index for index in needed if not self._is_whole(index)]

    def names(self) -> list[str]:
        """The files of the artifact besides the shards that are here."""
        made = (window.sidecar(self.folder, shard.index) for shard in self.plan.shards)
        return [*METADATA, window.ROWS, window.OFFER, *(p.name for p in made if p.exists())]

    def sidecars(self) -> list[dict[str, Any]]:
        """What was written of every shard, whether or not it is still here."""
        made = (read_sidecar_file(window.sidecar(self.folder, s.index)) for s in self.plan.shards)
        return [found for found in made if found is not None]

    def _reading(self) -> Reading | None:
        return window.read_reading(self._train, self.fingerprint, len(self.plan.shards))

    def _room(self, reading: Reading) -> int:
        """W: how many shards lie here at a time beside those that stay."""
        room = int(self.config.window_shards or 0) - len(reading.kept)
        if room < 1:
            raise UserError(
                f"dump.window_shards: expected more than {len(reading.kept)}, the number of shards "
                f"with held-out samples, found {self.config.window_shards}.",
                code="window-too-small",
                remedy="Raise dump.window_shards, or lower train.max_holdout_samples.",
                facts={"window_shards": self.config.window_shards, "kept": len(reading.kept)},
            )
        return room

    def _end(self, reading: Reading) -> int:
        return min(reading.next + self._room(reading), len(reading.order))

    def _is_last(self, reading: Reading) -> bool:
        return self._end(reading) == len(reading.order)

    def _is_whole(self, index: int) -> bool:
        if index in self._seen and (self.folder / hidden_states.shard_name(index)).exists():
            return True
        is_whole = read_sidecar(self.folder, self.plan.shards[index]) is not None
        (self._seen.add if is_whole else self._seen.discard)(index)
        return is_whole

    def _group(self, first: ShardPlan) -> Iterator[ShardPlan]:
        shard: ShardPlan | None = first
        while shard is not None:
            self._being_made.add(shard.index)
            yield shard
            shard = self._next(self._reading())

    def _next(self, reading: Reading | None) -> ShardPlan | None:
        """The next shard of this process, with room made for it; None if there is none for now."""
        if reading is None:
            return None
        for index in (*reading.kept, *reading.order[reading.next : self._end(reading)]):
            if not self.config.share.owns(index):
                continue
            # A shard that was made may be gone again before anybody looked here.
            is_made = window.sidecar(self.folder, index).exists()
            if self._is_whole(index) or (index in self._being_made and not is_made):
                continue
            self._make_room()
            # Its checksum is not that of the shard to come.
            with files.writing(self.folder):
                window.sidecar(self.folder, index).unlink(missing_ok=True)
            self._seen.discard(index)
            return self.plan.shards[index]
        return None

    def _make_room(self) -> None:
        """Remove shards that neither the last checkpoint nor the window needs, until the rest fits."""
        # Listed first: what another process makes for a later checkpoint is not judged by an earlier.
        paths = {path.name: path for path in self.folder.glob("shard_*.pt")}
        reading = self._reading()
        if reading is None:
            return
        needed = {*reading.kept, *reading.order[reading.next : self._end(reading)]}
        by_visit = [*dict.fromkeys(reversed(reading.order[: reading.next]))]  # the last one first
        places = int(self.config.window_shards or 0) - len(needed)
        spared = [index for index in by_visit if index not in needed][:places]
        names = {hidden_states.shard_name(index) for index in (*needed, *spared)}
        for name in paths.keys() - names:
            with files.writing(paths[name]):
                paths[name].unlink(missing_ok=True)
            logger.info("%s removed: a checkpoint of train covers it", name)
