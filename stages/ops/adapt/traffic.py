# SPDX-License-Identifier: Apache-2.0
"""Traffic -> rows to learn from, and rows held out to measure on.

In: prompts in any shape that synth reads (JSON lines, Parquet, a folder, a hub data set), or the log of a
vLLM server that was started with `--enable-log-requests` at log level DEBUG, where each request's JSON
body is a line. Out: `train.jsonl` and `held_out.jsonl`, the same for the same traffic. A chat that grows is
logged once a turn: its longest form counts, and chats that begin alike stay on one side.
"""

import collections
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.paths import find_input
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt, Unusable, parse_row
from shared.prompts.sources import Duplicates, Source

HELD_OUT_SHARE = 0.1
MIN_HELD_OUT, MAX_HELD_OUT = 8, 64
MIN_ROWS = 5 * MIN_HELD_OUT
MAX_BAD_FRACTION = 0.5
_LOGS = (".log", ".out", ".txt")
# As vLLM's RequestLogger writes a request: `Request chatcmpl-1 JSON body: {"messages": ...}`.
_BODY = re.compile(r"Request \S+ JSON body: (\{.*)$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Where the rows are, and how many."""

    train: Path
    held_out: Path
    counts: dict[str, int]


def split(
    traffic: str,
    workspace: Path,
    folder: Path,
    *,
    max_rows: int,
    template_kwargs: Mapping[str, Any],
) -> Split:
    """Write the two files.

    Args:
        max_rows: rows to learn from, at most; which ones follows from their content.
        template_kwargs: the run's; a logged request with others was another prompt to the target.

    Raises:
        UserError: no such traffic, most of it cannot be read, or there are too few different chats.
    """
    usable, reasons = _usable(traffic, _read(traffic, workspace, template_kwargs))
    prompts = longest_forms(usable)
    reasons["shorter_form"] = len(usable) - len(prompts)
    held_out, train = _apart(prompts)
    if len(prompts) < MIN_ROWS or len(held_out) < MIN_HELD_OUT:
        raise UserError(
            f"{traffic}: expected at least {MIN_ROWS} chats, most with openings of their own, found "
            f"{len(prompts)}, of which {len(held_out)} can be held out.",
            code="traffic-too-small",
            remedy="Gather more traffic. A vLLM server logs it with --enable-log-requests and "
            "VLLM_LOGGING_LEVEL=DEBUG.",
            facts={"rows": len(prompts)},
        )
    counts = {"train": len(train[:max_rows]), "held_out": len(held_out)}
    counts["left_out"] = reasons.total()
    logger.info("traffic: %s; left out: %s", counts, dict(+reasons))
    found = Split(folder / "train.jsonl", folder / "held_out.jsonl", counts)
    _write(found.held_out, held_out)
    _write(found.train, train[:max_rows])
    return found


def _usable(
    traffic: str, rows: Iterable[Prompt | BadRow]
) -> tuple[list[Prompt], collections.Counter[str]]:
    """(the chats, each once; how many rows were left out, by reason).

    Raises:
        UserError: most of it cannot be read.
    """
    reasons: collections.Counter[str] = collections.Counter()
    usable: list[Prompt] = []
    for row in Duplicates(same_content=True).marked(rows):
        if isinstance(row, BadRow):
            reasons[row.reason] += 1
        else:
            usable.append(row)
    bad = sum(n for reason, n in reasons.items() if not reason.startswith("duplicate"))
    if bad > MAX_BAD_FRACTION * (bad + len(usable)):
        raise UserError(
            f"{traffic}: expected chats, found {bad} of {bad + len(usable)} rows that cannot be used: "
            f"{dict(reasons)}.",
            code="traffic-unusable",
            remedy="Give chats with `messages`. A server's log must not be cut (--max-log-len); "
            "other_template: set run.chat_template_kwargs to what the requests say.",
            facts={"reasons": dict(reasons)},
        )
    return usable, reasons


def _read(
    traffic: str, workspace: Path, template_kwargs: Mapping[str, Any]
) -> Iterator[Prompt | BadRow]:
    found = find_input(traffic, workspace)
    if found is not None and found.is_file() and found.suffix in _LOGS:
        return read_server_log(found, template_kwargs)
    return sources.read_source(Source(path=traffic), workspace, label="--traffic")


def read_server_log(path: Path, template_kwargs: Mapping[str, Any]) -> Iterator[Prompt | BadRow]:
    """The chat requests of a vLLM server's log; other lines are passed over.

    Raises:
        UserError: no line is a request.
    """
    seen = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if (match := _BODY.search(line)) is None:
                continue
            seen += 1
            try:
                yield _prompt_of(json.loads(match[1]), path.name, template_kwargs)
            except Unusable as error:
                yield BadRow(f"line {number}", error.reason, error.detail)
            except (ValueError, RecursionError):
                yield BadRow(f"line {number}", "cut_off", "the body is no whole JSON")
    if not seen:
        raise UserError(
            f"{path}: expected a vLLM server's log with requests' bodies, found no line with one.",
            code="log-without-requests",
            remedy="Start the server with --enable-log-requests and VLLM_LOGGING_LEVEL=DEBUG, or give "
            "the prompts as JSON lines.",
            facts={"path": str(path)},
        )


def _prompt_of(body: Any, source: str, template_kwargs: Mapping[str, Any]) -> Prompt:
    """A request's body as a prompt, under an id that follows from its content.

    Raises:
        Unusable: it is no chat, or the server rendered it with other switches than the run will.
    """
    if "messages" not in body:
        raise Unusable("no_chat", "a request without messages")
    asked = {**template_kwargs, **(body.get("chat_template_kwargs") or {})}
    if asked != dict(template_kwargs):
        raise Unusable("other_template", f"chat_template_kwargs {asked}")
    row = {key: body[key] for key in ("messages", "tools") if body.get(key)}
    prompt = parse_row(row, source=source)
    return prompt.renamed(f"log-{prompt.content_hash()}")


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


def _apart(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(held out, to learn from): a share by hash, chats of one opening together."""
    openings = collections.defaultdict(list)
    for prompt in prompts:
        opening = json.dumps([prompt.turns[0].asked, prompt.tools], sort_keys=True)
        openings[hashlib.sha256(opening.encode()).digest()].append(prompt)
    room = min(max(round(HELD_OUT_SHARE * len(prompts)), MIN_HELD_OUT), MAX_HELD_OUT)
    held_out: list[Prompt] = []
    train: list[Prompt] = []
    for _, alike in sorted(openings.items()):
        fits = len(held_out) + len(alike) <= room
        (held_out if fits else train).extend(alike)
    return held_out, train


def _write(path: Path, prompts: Iterable[Prompt]) -> None:
    lines = []
    for prompt in prompts:
        row = {
            "id": prompt.sample_id,
            "category": prompt.category,
            "messages": list(prompt.conversation),
            "tools": list(prompt.tools),
        }
        lines.append(json.dumps({key: value for key, value in row.items() if value}))
    files.write_text(path, "".join(line + "\n" for line in lines))
