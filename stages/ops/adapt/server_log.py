# SPDX-License-Identifier: Apache-2.0
"""The logs of a vLLM server -> the chats that it was asked.

In: logs of a server that was started with `--enable-log-requests` at log level DEBUG, where each request's
JSON body is a line, or files of requests, in any form that `log_lines.py` lists: one file, a folder or a
glob, rotated or compressed under any name. Out: prompts; a request that the run would render otherwise than
the server did, or that is no chat, as a `BadRow`.
"""

import collections
import itertools
import logging
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.prompts import folders, formats
from shared.prompts.rows import BadRow, Prompt, Unusable, parse_row
from shared.prompts.text_files import opened, require_data, require_text, unreadable
from shared.runtime.wording import counted
from stages.ops.adapt import log_lines

NO_CHAT = "no_chat"
OTHER_TEMPLATE = "other_template"
_MAX_LINE_BYTES = 64 << 20
_LOOKED_AT = 100  # lines that tell what a file is
# Fields by which a request gets another prompt than its messages alone, and their values that change nothing.
_CHANGES_PROMPT: dict[str, tuple[Any, ...]] = {
    "chat_template": (None, ""),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, False),
    "truncate_prompt_tokens": (None,),
}
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendering:
    """How the run renders a chat.

    Attributes:
        kwargs: `run.template_kwargs`.
        variables: what its chat template reads; None where that is not known, and all may be read.
    """

    kwargs: Mapping[str, Any]
    variables: Set[str] | None = None

    def reads(self, name: str) -> bool:
        """Whether a variable can change the prompt."""
        return self.variables is None or name in self.variables

    @property
    def switches(self) -> list[str]:
        """The run's own variables that change its prompts."""
        return list(filter(self.reads, self.kwargs))

    def others(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The variables by which a request is another prompt than in this run."""
        return {
            name: value
            for name, value in asked.items()
            if self.reads(name) and (name not in self.kwargs or self.kwargs[name] != value)
        }


def log_files(traffic: str, workspace: Path) -> list[Path]:
    """The server's logs that `traffic` means, and what lies beside them; none where it means data.

    Raises:
        UserError: a folder cannot be read.
    """
    paths = [each.path for each in folders.listed_files(traffic, workspace, label="--traffic")]
    found = [(path, _is_log(path)) for path in paths if path.is_file()]
    if any(formats.is_data(path) and not is_log for path, is_log in found):
        return []
    return [path for path, _ in found] if any(is_log for _, is_log in found) else []


def _is_log(path: Path) -> bool:
    """Whether a file is a log and no rows, by its first lines: a row may have a field `message`, too."""
    if formats.is_data(path) and formats.suffix_of(path) not in _JSON_LINES:
        return False
    try:
        with opened(path) as stream:
            full = (line for line in _lines(stream) if line.strip())
            lines = list(itertools.islice(full, _LOOKED_AT))
    except _READ_ERRORS:
        return not formats.is_data(path)
    if any(map(_is_row, lines)):
        return False
    is_text = not formats.is_data(path) and not (lines and _is_json(lines[0]))
    return is_text or any(map(log_lines.is_record, lines))


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(formats.parse_json(line), dict | list)
    except Unusable:
        return False


def _is_row(line: bytes) -> bool:
    try:
        parse_row(formats.parse_json(line))
    except Unusable:
        return False
    return True


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines; one that no chat could fill comes in pieces, so that none fills the memory."""
    return iter(lambda: stream.readline(_MAX_LINE_BYTES), b"")


def read_logs(paths: Iterable[Path], rendering: Rendering) -> Iterator[Prompt | BadRow]:
    """The requests in these logs; other lines are passed over.

    Raises:
        UserError: no line is a request, or a file is not what its name says.
    """
    paths = list(paths)
    without, unsaid, models = set(paths), 0, collections.Counter[str]()
    for path in paths:
        for position, body in _bodies(path):
            without.discard(path)
            try:
                if isinstance(body, Unusable):
                    raise body
                asked = _asked(body)
                yield _prompt_of(body, asked, path.name, rendering)
            except Unusable as error:
                yield BadRow(position, error.reason, error.detail)
                continue
            models[files.printable(body.get("model"))] += 1
            unsaid += asked.keys().isdisjoint(rendering.switches)
    if without == set(paths):
        raise UserError(
            f"{', '.join(map(str, paths[:3]))}: expected a vLLM server's log with requests' bodies, found "
            "no line with one.",
            code="log-without-requests",
            remedy="Start the server with --enable-log-requests and VLLM_LOGGING_LEVEL=DEBUG, or give "
            "the prompts as JSON lines. stages/ops/README.md#adapt lists the forms that are read.",
            facts={"paths": [str(path) for path in paths]},
        )
    if without:
        names = sorted(files.printable(path.name) for path in without)
        logger.warning(
            "%s without a request in it: %s", counted(len(names), "file"), ", ".join(names[:8])
        )
    _warn(models, unsaid, rendering)


def _warn(models: collections.Counter[str], unsaid: int, rendering: Rendering) -> None:
    """What the log does not tell, and the user may know."""
    if len(models) > 1:
        logger.warning(
            "the log has chats of several models: %s; all are taken for the target's. Take out those of "
            "an adapter.",
            ", ".join(f"{model} ({count:,})" for model, count in models.most_common()),
        )
    if rendering.switches and unsaid:
        logger.warning(
            "%d of %d chats leave %s to the server; they are taken as if it was started with the run's "
            "values (--default-chat-template-kwargs)",
            unsaid,
            models.total(),
            ", ".join(rendering.switches),
        )


def _bodies(path: Path) -> Iterator[tuple[str, log_lines.Found]]:
    """(its place in the log, its body or what is wrong with it) of each request.

    Raises:
        UserError: the file cannot be read.
    """
    files.require_file(path)
    try:
        require_data(path)
        require_text(path)
        with opened(path) as stream:
            for number, body in log_lines.bodies(_lines(stream)):
                yield f"{path.name} line {number}", body
    except _READ_ERRORS as error:
        raise unreadable(path, "a log", error) from error


def _asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that the server gives to the chat template for this request, as vLLM 0.32 does.

    Raises:
        Unusable: it is no chat, or its variables are none.
    """
    if "messages" not in body:
        raise Unusable(NO_CHAT, "a request without messages")
    own = body.get("chat_template_kwargs") or {}
    if not isinstance(own, dict):
        raise Unusable("broken_body", f"chat_template_kwargs is {type(own).__name__}")
    asked = dict(own)
    if (effort := body.get("reasoning_effort")) is not None:
        asked["reasoning_effort"] = effort
        asked.setdefault("enable_thinking", effort != "none")
    if documents := body.get("documents"):
        asked["documents"] = documents
    return asked


def _prompt_of(
    body: Mapping[str, Any], asked: Mapping[str, Any], source: str, rendering: Rendering
) -> Prompt:
    """A request's body as a prompt, under an id that follows from its content.

    Raises:
        Unusable: it is no chat, or the server rendered it otherwise than the run will.
    """
    others = rendering.others(asked)
    others |= {
        name: body[name]
        for name, usual in _CHANGES_PROMPT.items()
        if body.get(name, usual[0]) not in usual
    }
    if others:
        raise Unusable(OTHER_TEMPLATE, f"the request says {others}")
    row = {key: body[key] for key in ("messages", "tools") if body.get(key)}
    prompt = parse_row(row, source=source)
    return prompt.renamed(f"log-{prompt.content_hash()}")
