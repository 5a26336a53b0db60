# SPDX-License-Identifier: Apache-2.0
"""Traffic -> rows to learn from, and rows held out to measure on.

In: prompts in any shape that synth reads (JSON lines, Parquet, a folder, a hub data set), or the logs of a
vLLM server (`server_log.py`). Out: `train.jsonl` and `held_out.jsonl`, the same for the same traffic. A chat
that grows is logged once a turn: its longest form counts, and chats that begin alike stay on one side.
"""

import collections
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Duplicates, Source
from shared.runtime.wording import counted, listed
from stages.ops.adapt.server_log import NO_CHAT, OTHER_TEMPLATE, Rendering, log_files, read_logs

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
HELD_OUT_SHARE = 0.1
MIN_HELD_OUT, MAX_HELD_OUT = 8, 64
MIN_ROWS = 5 * MIN_HELD_OUT
MAX_BAD_FRACTION = 0.5
_TOO_MANY = "over_max_rows"
_REMEDIES = {
    "cut_off": "Start the server without --max-log-len, and give the log as its collector wrote it; "
    "journalctl cuts long lines without --all.",
    OTHER_TEMPLATE: "Set run.chat_template_kwargs to what the requests say.",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Where the rows are, and how many.

    Attributes:
        counts: rows of each side, and rows left out.
        too_many: of those left out, the chats beyond `max_rows`.
    """

    folder: Path
    counts: dict[str, int]
    too_many: int = 0

    @property
    def train(self) -> Path:
        return self.folder / TRAIN

    @property
    def held_out(self) -> Path:
        return self.folder / HELD_OUT

    def summary(self) -> str:
        """`936 chats to learn from, 64 held out, 12 left out`."""
        train, held_out, left_out = (self.counts[key] for key in ("train", "held_out", "left_out"))
        return (
            f"{counted(train, 'chat')} to learn from, {held_out:,} held out, {left_out:,} left out"
        )


def split(
    traffic: str,
    workspace: Path,
    folder: Path,
    *,
    max_rows: int,
    template_kwargs: Mapping[str, Any],
    variables: Set[str] | None = None,
    fits: Callable[[Prompt], bool] = lambda _: True,
) -> Split:
    """Write the two files.

    Args:
        max_rows: rows to learn from, at most; which ones follows from their content.
        template_kwargs: the run's; a logged request with others was another prompt to the target.
        variables: what the target's chat template reads; a request's others change nothing.
        fits: whether bench can measure on a chat; one that it cannot is never held out.

    Raises:
        UserError: no such traffic, most of it cannot be read, or there are too few different chats.
    """
    prompts, reasons = chats(traffic, workspace, Rendering(template_kwargs, variables))
    held_out, train, unfit = _apart(prompts, fits)
    if len(prompts) < MIN_ROWS or len(held_out) < MIN_HELD_OUT:
        why = f" {unfit} do not fit into bench." if unfit else ""
        raise UserError(
            f"{traffic}: expected at least {MIN_ROWS} chats, most with openings of their own, found "
            f"{len(prompts)}, of which {len(held_out)} can be held out.{why} Left out: "
            f"{listed(reasons) or 'none'}.",
            code="traffic-too-small",
            remedy="Gather more traffic. A vLLM server logs it with --enable-log-requests and "
            "VLLM_LOGGING_LEVEL=DEBUG. Where chats do not fit, lower bench.max_tokens.",
            facts={"rows": len(prompts), "reasons": dict(+reasons), "unfit": unfit},
        )
    reasons[_TOO_MANY] = max(0, len(train) - max_rows)
    counts = {"train": len(train[:max_rows]), "held_out": len(held_out)}
    counts["left_out"] = reasons.total()
    if unfit:
        logger.info("traffic: too long for bench, and not held out: %s", counted(unfit, "chat"))
    found = Split(folder, counts, reasons[_TOO_MANY])
    left_out = listed(reasons)
    logger.info("traffic: %s%s", found.summary(), f" ({left_out})" if left_out else "")
    _write(found.held_out, held_out)
    _write(found.train, train[:max_rows])
    return found


def chats(
    traffic: str, workspace: Path, rendering: Rendering
) -> tuple[list[Prompt], collections.Counter[str]]:
    """(the different chats, each in its longest form; how many rows were left out, by reason).

    Raises:
        UserError: no such traffic, or most of it cannot be read.
    """
    reasons: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    usable: list[Prompt] = []
    for row in Duplicates(same_content=True).marked(_read(traffic, workspace, rendering)):
        if isinstance(row, BadRow):
            reasons[row.reason] += 1
            examples.setdefault(row.reason, row.detail)
        else:
            usable.append(row)
    _require_most(traffic, len(usable), reasons, examples)
    prompts = longest_forms(usable)
    reasons["shorter_form"] = len(usable) - len(prompts)
    return prompts, reasons


def _require_most(
    traffic: str, usable: int, reasons: collections.Counter[str], examples: Mapping[str, str]
) -> None:
    """Refuse traffic of which the smaller part would stand for all.

    Raises:
        UserError: most of its chats cannot be used. Requests that are no chats do not count.
    """
    bad = collections.Counter(
        {
            reason: count
            for reason, count in reasons.items()
            if reason != NO_CHAT and not reason.startswith("duplicate")
        }
    )
    if bad.total() <= MAX_BAD_FRACTION * (bad.total() + usable):
        return
    most = bad.most_common(1)[0][0]
    raise UserError(
        f"{traffic}: expected chats, found {bad.total()} of {bad.total() + usable} rows that cannot be "
        f"used: {listed(reasons)}; for example, {most}: {examples[most] or 'no more is known'}.",
        code="traffic-unusable",
        remedy=_REMEDIES.get(
            most, "Give chats with `messages`: stages/ops/README.md#adapt lists the forms."
        ),
        facts={"reasons": dict(reasons)},
    )


def _read(traffic: str, workspace: Path, rendering: Rendering) -> Iterator[Prompt | BadRow]:
    if logs := log_files(traffic, workspace):
        return read_logs(logs, rendering)
    return sources.read_source(Source(path=traffic), workspace, label="--traffic")


def digest(traffic: str, workspace: Path) -> str:
    """A hash of the traffic's files, or the hub's id and revision.

    Raises:
        UserError: there are none.
    """
    if logs := log_files(traffic, workspace):
        hashes = "".join(map(files.sha256, logs))
        return hashlib.sha256(hashes.encode()).hexdigest()
    return sources.digest(Source(path=traffic), workspace, label="--traffic")


def longest_forms(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Without those that another one continues: its turns begin with all of theirs.

    Worked example: of [q1], [q1, a1, q2] and [q3] the last two are left.
    """
    continued: set[bytes] = set()
    whole = []
    for prompt in prompts:
        forms = list(_forms(prompt))
        continued.update(forms[:-1])
        whole.append(forms[-1])
    return [prompt for prompt, form in zip(prompts, whole, strict=True) if form not in continued]


def _forms(prompt: Prompt) -> Iterator[bytes]:
    """A hash for the conversation up to each of its messages."""
    running = hashlib.sha256(json.dumps(prompt.tools).encode())
    for message in prompt.conversation:
        running.update(json.dumps(message, sort_keys=True).encode())
        yield running.digest()


def _apart(
    prompts: Sequence[Prompt], fits: Callable[[Prompt], bool]
) -> tuple[list[Prompt], list[Prompt], int]:
    """(held out, to learn from, how many are of the second since they do not fit).

    A share by hash, chats of one opening together.
    """
    openings = collections.defaultdict(list)
    for prompt in prompts:
        openings[hashlib.sha256(prompt.opening.encode()).digest()].append(prompt)
    room = min(max(round(HELD_OUT_SHARE * len(prompts)), MIN_HELD_OUT), MAX_HELD_OUT)
    held_out: list[Prompt] = []
    train: list[Prompt] = []
    unfit = 0
    for _, alike in sorted(openings.items()):
        has_room = len(held_out) + len(alike) <= room
        is_held_out = has_room and all(map(fits, alike))  # tokenised only where there is room
        unfit += len(alike) if has_room and not is_held_out else 0
        (held_out if is_held_out else train).extend(alike)
    return held_out, train, unfit


def _write(path: Path, prompts: Iterable[Prompt]) -> None:
    files.write_text(path, "".join(json.dumps(each.as_row()) + "\n" for each in prompts))
