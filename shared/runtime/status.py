# SPDX-License-Identifier: Apache-2.0
"""Row accounting, and the status file that `ops` and a waiting person read.

    in = ok + skipped{reason: n} + failed{reason: n}      to the last row

*skipped* is a row that was left out on purpose (a duplicate, too long); *failed* is a row that
could not be done (broken JSON, an engine error). Both are listed in `rejects.jsonl`.
"""

import collections
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from shared.errors import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, EyrieError, OutputError, UserError
from shared.io import files
from shared.io.records import Shape, read_record
from shared.runtime.log import Every
from shared.runtime.process import is_alive

_FIRST_WAVE = 10
BEAT_S = 10.0
SILENT_AFTER_S = 45.0

logger = logging.getLogger(__name__)


# Bounds within which a reader may compute: a file is anybody's.
_Count = Annotated[int, pydantic.Field(ge=0, le=1 << 62)]
_Time = Annotated[float, pydantic.Field(ge=0, le=1e11)]


class _Progress(Shape):
    done: _Count | None = None
    total: _Count | None = None
    unit: str = ""
    left_s: float | None = None


class _Error(Shape):
    code: str
    problem: str
    remedy: str = ""
    facts: dict[str, Any] = pydantic.Field(default_factory=dict)


class _Record(Shape):
    state: Literal["running", "done", "failed", "stopped"]
    pid: int
    host: str
    started_s: _Time
    updated_s: _Time
    num_shards: int | None = None
    recipe: str | None = None
    exit_code: int | None = None
    message: str = ""
    error: _Error | None = None
    progress: _Progress | None = None


def read_status(path: Path) -> dict[str, Any]:
    """What a status file says.

    Raises:
        UserError: it is missing, or not one.
    """
    return read_record(path, _Record, remedy="Delete it: the stage writes it anew.")


class Accounting:
    """Counts each row once, remembers why rows were rejected."""

    def __init__(self) -> None:
        self.ok = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()
        self._rejects: list[dict[str, str]] = []

    @classmethod
    def sum_of(cls, counts: Iterable[Mapping[str, Any]]) -> "Accounting":
        """What several `as_dict` come to, without the rows' reasons."""
        total = cls()
        for each in counts:
            total.ok += each["ok"]
            total.skipped.update(each["skipped"])
            total.failed.update(each["failed"])
        return total

    def skip(self, row: str, reason: str, detail: str = "") -> None:
        self.skipped[reason] += 1
        self._rejects.append({"row": row, "skipped": reason, "detail": detail})

    def fail(self, row: str, reason: str, detail: str = "") -> None:
        self.failed[reason] += 1
        self._rejects.append({"row": row, "failed": reason, "detail": detail})

    @property
    def rows_in(self) -> int:
        return self.ok + self.skipped.total() + self.failed.total()

    def as_dict(self) -> dict[str, Any]:
        return {
            "in": self.rows_in,
            "ok": self.ok,
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(self.failed.items())),
        }

    def write_rejects(self, path: Path) -> None:
        """One JSON line a rejected row; the file exists even when it is empty."""
        lines = [json.dumps(reject, ensure_ascii=True) for reject in self._rejects]
        files.write_text(path, "".join(line + "\n" for line in lines))

    def check(self, *, max_failed_fraction: float, label: str, rejects: Path) -> None:
        """Refuse an outcome that must not be called done.

        Raises:
            UserError: there was nothing to do.
            OutputError: no row came out, or too many failed.
        """
        self._check(self.ok, max_failed_fraction, label, rejects, OutputError)

    def check_input(
        self, *, usable: int, max_failed_fraction: float, label: str, rejects: Path
    ) -> None:
        """The same of rows that were only read so far: ask before an engine is started for them.

        Raises:
            UserError: no row is usable, or too many are not.
        """
        self._check(usable, max_failed_fraction, label, rejects, UserError)

    def _check(
        self, good: int, limit: float, label: str, rejects: Path, fault: type[EyrieError]
    ) -> None:
        rejected, failed = self.skipped.total() + self.failed.total(), self.failed.total()
        rows = good + rejected
        if rows == 0:
            raise UserError(
                f"{label}: expected at least one row, found none.",
                code="no-rows",
                remedy="Check that the file is not empty and that its rows are of a known form.",
            )
        facts = {"rows": rows, "usable": good, "failed": failed, "rejects": str(rejects)}
        remedy = f"{rejects} has each row's reason."
        if good == 0:
            raise fault(
                f"{label}: none of {rows} rows is usable ({self.summary()}).",
                code="no-usable-rows",
                remedy=remedy,
                facts=facts,
            )
        if failed / rows > limit:
            raise fault(
                f"{label}: {failed} of {rows} rows failed ({failed / rows:.1%}), more than "
                f"max_failed_fraction {limit:.1%} ({self.summary()}).",
                code="too-many-failed-rows",
                remedy=f"{remedy} Correct the rows, or raise max_failed_fraction.",
                facts=facts,
            )

    def summary(self) -> str:
        parts = [f"ok={self.ok}"]
        parts += [f"skipped.{reason}={n}" for reason, n in sorted(self.skipped.items())]
        parts += [f"failed.{reason}={n}" for reason, n in sorted(self.failed.items())]
        return " ".join([f"in={self.rows_in}", *parts])


class Status:
    """`status/<stage>.json`: what the stage is doing, rewritten every few seconds.

    While the process works, the file's time is set to now every `BEAT_S`, also where the work itself
    says nothing for minutes (an engine starts): a file that is "running" and older than
    `SILENT_AFTER_S` belongs to a process that died, or was stopped, without saying so.

    Attributes:
        about: what every record of this process says (`num_shards`, `recipe`); the command line
            sets it once.
    """

    about: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, path: Path, *, period_s: float = 5.0) -> None:
        self.path = path
        self._due = Every(period_s)
        self._started_s = time.time()
        self._first: tuple[float, int] | None = None  # when progress began, and what was done
        self._last: dict[str, Any] = {}
        self._beats = False

    def _beat(self) -> None:
        """Keep the file young for as long as this process lives."""
        while True:
            time.sleep(BEAT_S)
            with contextlib.suppress(OSError):  # it may be gone, with the whole run
                os.utime(self.path)

    def _write(self, state: str, **more: Any) -> None:
        self._last |= more
        record = {
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **self.about,
            "started_s": round(self._started_s, 3),
            "updated_s": round(time.time(), 3),
            **self._last,
        }
        try:
            files.write_json(self.path, record)
        except UserError as error:  # a status that cannot be written must not end the work
            logger.warning("%s", error)
        if state == "running" and not self._beats:
            self._beats = True
            threading.Thread(target=self._beat, daemon=True, name="eyrie-beat").start()

    def progress(self, done: int, total: int, unit: str, **facts: Any) -> None:
        """Tell how far the work is; it is logged and written at most once a period, and at the end.

        The time left is told once ten, and as many as are `in_flight` at once, or a tenth of all are
        done: while the first requests of a server all run, hardly any has ended.
        """
        now = time.monotonic()
        self._first = self._first or (now, done)
        is_end = done == total and self._last.get("progress", {}).get("done") != done
        if not (self._due() or is_end):
            return
        began_s, began_with = self._first
        made = done - began_with
        wave = max(_FIRST_WAVE, facts.get("in_flight", 0))
        is_known = made >= wave or 0 < total <= 10 * made
        left_s = round((now - began_s) * (total - done) / made) if is_known else None
        shown = " ".join(f"{name}={value}" for name, value in facts.items())
        left = "?" if left_s is None else left_s
        logger.info("%s=%d/%d %s left_s=%s", unit, done, total, shown, left)
        record = {"done": done, "total": total, "unit": unit, "left_s": left_s, **facts}
        self._write("running", progress=record)

    def rate(self, amount: float) -> int:
        """`amount` a second since progress began; 0 in the first second, which tells nothing yet."""
        began_s = self._first[0] if self._first else time.monotonic()
        passed_s = time.monotonic() - began_s
        return round(amount / passed_s) if passed_s >= 1 else 0

    def opened(self) -> None:
        """Say that the process is at work, before it knows on what; earlier progress stays."""
        if self._is_anothers():
            return
        with contextlib.suppress(OSError):  # a folder that cannot be written is reported below
            files.sweep_temporaries(self.path.parent, of=self.path.name)
        self._write("running", **self._earlier("exit_code", "message", "error"))
        self._last = {}

    def started(self) -> None:
        self._write("running")

    def done(self) -> None:
        """Say that the stage ended well."""
        self._last = self._earlier("error") | self._last
        self._write("done", exit_code=EXIT_DONE, message="")

    def failed(self, error: EyrieError) -> None:
        """Say how the stage ended, with the error's parts for `ops triage`."""
        if error.exit_code == EXIT_RETRY and self._is_anothers():
            return  # it works on, and this process was sent away
        state = "stopped" if error.exit_code == EXIT_STOPPED else "failed"
        self._last = self._earlier() | self._last
        self._write(state, exit_code=error.exit_code, message=str(error), error=error.as_dict())

    def _is_anothers(self) -> bool:
        """Whether another process of this machine is at work and tells so here."""
        if not self.path.exists():
            return False
        try:
            found = read_status(self.path)
        except UserError:
            return False
        at_work = found["state"] == "running" and found["host"] == socket.gethostname()
        return at_work and found["pid"] != os.getpid() and is_alive(found["pid"])

    def _earlier(self, *but: str) -> dict[str, Any]:
        """What the file tells of the work, since when included; not of the process."""
        if not self.path.exists():
            return {}
        try:
            found = dict(read_status(self.path))
        except UserError as error:
            logger.warning("%s", error)
            return {}
        self._started_s = found.pop("started_s", self._started_s)
        return {
            key: value
            for key, value in found.items()
            if key not in ("state", "pid", "host", "num_shards", "recipe", "updated_s", *but)
        }
