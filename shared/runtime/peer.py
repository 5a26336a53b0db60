# SPDX-License-Identifier: Apache-2.0
"""Two stages that work at the same time: is the other one still there?

Its status files tell, as they tell `ops status`: on this host by the process id, on another host by
the time of the file, which a live process touches every few seconds.
"""

import re
import socket
import time
from pathlib import Path

from shared.errors import RetryableError, UserError
from shared.runtime.process import is_alive
from shared.runtime.status import SILENT_AFTER_S, read_status

_LOOK_EVERY_S = 1.0


class Peer:
    """The other stage, as one that waits for it sees it.

    Args:
        folder: the run's folder `status`.
        patience_s: how long it may be away before waiting ends.
    """

    def __init__(self, folder: Path, stage: str, *, patience_s: float) -> None:
        self._folder, self._stage, self._patience_s = folder, stage, patience_s
        self._gone_since_s: float | None = None
        self._looked_s = -_LOOK_EVERY_S

    def require(self) -> None:
        """Note whether it is there; called again and again while waiting.

        Raises:
            RetryableError: it has been away for `patience_s`.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        reason = absence(self._folder, self._stage)
        if not reason:
            self._gone_since_s = None
            return
        self._gone_since_s = self._gone_since_s or now_s
        if now_s - self._gone_since_s >= self._patience_s:
            raise RetryableError(
                f"waited {self._patience_s:.0f} s for {self._stage}, which is not at work: {reason}.",
                code=f"{self._stage}-gone",
                remedy=f"Start {self._stage} again and run the same command again: both continue.",
                facts={"stage": self._stage, "reason": reason},
            )


def absence(folder: Path, stage: str) -> str:
    """Why no process of a stage is at work; "" if one is."""
    own = re.compile(rf"{stage}(-\d+)?\.json")
    reasons = []
    for path in sorted(folder.glob(f"{stage}*.json")):
        if own.fullmatch(path.name):
            try:
                record, age_s = read_status(path), time.time() - path.stat().st_mtime
            except (UserError, OSError):  # it is being replaced, or damaged: ops status says which
                continue
            if not (reason := _absence(record, age_s)):
                return ""
            reasons.append(reason)
    return reasons[0] if reasons else "it was never started"


def _absence(record: dict[str, object], age_s: float) -> str:
    if record["state"] != "running":
        message = str(record.get("message") or "").splitlines()
        return f"it ended with exit code {record.get('exit_code')}" + (
            f" ({message[0][:200].rstrip('.')})" if message else ""
        )
    is_here = record["host"] == socket.gethostname()
    if is_here and not is_alive(int(str(record["pid"]))):
        return f"its process {record['pid']} is gone and left no error"
    if not is_here and age_s > SILENT_AFTER_S:
        return f"its process on {record['host']} has been silent for {age_s:.0f} s"
    return ""
