# SPDX-License-Identifier: Apache-2.0
r"""Lines of a log as their collector wrote them -> the requests' bodies in them.

    Request chatcmpl-1 JSON body: {...}                       vLLM itself, coloured or not
    {"log": "...\n", "stream": "stderr", "time": ...}          Docker's json-file
    2026-11-30T10:00:00.1Z stderr F ...                       Kubernetes (CRI)
    {"MESSAGE": "...", "_PID": ...}                           journalctl -o json --all
    {"message": "...", "levelname": ...}                      vLLM's JSON formatter, log shippers
    {"custom_id": ..., "body": {"messages": ...}}             an OpenAI batch file; `request` likewise

One may be inside another. A line that Docker, Kubernetes or journald split into pieces is joined.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shared.prompts.content import Unusable

# As vLLM's RequestLogger writes a request.
_BODY = re.compile(rb"Request \S+ JSON body: (\{.*)$", re.DOTALL)
_COLOURS = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")
_CRI = re.compile(rb"\d{4}-\d\d-\d\dT\S+ (stdout|stderr) ([PF]) (.*)", re.DOTALL)
_TEXT_FIELDS = ("log", "message", "MESSAGE")
_BODY_FIELDS = ("body", "request")
_MAX_DEPTH = 4  # of records inside records: three are a container's log of JSON, shipped
_DOCKER_PIECE_BYTES = 16 << 10  # of each piece of a line but the last
_MAX_BYTES = 64 << 20  # of a line: no conversation that a target could take is as long
_REPLACED = "\ufffd".encode()  # what is left of half a character

Found = dict[str, Any] | Unusable


def bodies(lines: Iterable[bytes]) -> Iterator[tuple[int, Found]]:
    """(number of its first line, the body or what is wrong with it) of each request."""
    for number, text in _joined(lines):
        if (found := body_of(text)) is not None:
            yield number, found


def body_of(text: bytes, depth: int = 0) -> Found | None:
    """The body of the request that a whole line holds; None where it holds none."""
    if (value := _object(text)) is None:
        match = _BODY.search(_COLOURS.sub(b"", text))
        return _parsed(match[1]) if match else None
    for name in _BODY_FIELDS:
        body = value.get(name)
        if isinstance(body, dict) and not body.keys().isdisjoint(("messages", "prompt")):
            return body
    if value.get("MESSAGE", "") is None:
        return Unusable("cut_off", "journalctl left a long MESSAGE out: --all prints it")
    inner = _text_in(value)
    return None if inner is None or depth == _MAX_DEPTH else body_of(inner, depth + 1)


def is_record(line: bytes) -> bool:
    """Whether a line is a request, or a collector's record around a line of a log."""
    value = _object(line)
    return body_of(line) is not None or (value is not None and _text_in(value) is not None)


def _joined(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, out of a collector's record; those that it split are whole again."""
    begun: dict[str, tuple[int, bytes]] = {}  # by stream
    for number, line in enumerate(lines, 1):
        stream, text, is_piece = _piece(line)
        if stream in begun and _BODY.search(text):  # the rest has got lost
            yield begun.pop(stream)
        first, before = begun.pop(stream, (number, b""))
        is_halved = before.endswith(_REPLACED) or (before and text.startswith(_REPLACED))
        whole = before + (b"\xff" if is_halved else b"") + text  # no UTF-8: the row is left out
        if is_piece and len(whole) < _MAX_BYTES and _is_open(whole):
            begun[stream] = first, whole
        else:
            yield first, whole
    yield from begun.values()


def _piece(line: bytes) -> tuple[str, bytes, bool]:
    """(its stream, its text, whether more of its line may follow) of one line of a file."""
    if match := _CRI.match(line):
        return match[1].decode(), match[3].rstrip(b"\r\n"), match[2] == b"P"
    value = _object(line) or {}
    text = _text_in(value)
    if text is None or not value.keys().isdisjoint(_BODY_FIELDS):
        return "", line, False
    is_docker = isinstance(value.get("log"), str) and not text.endswith(b"\n")
    is_piece = (
        (is_docker and len(text) >= _DOCKER_PIECE_BYTES)
        or value.get("_LINE_BREAK") == "line-max"
        or value.get("CONTAINER_PARTIAL_MESSAGE") == "true"
    )
    return f"{value.get('stream')} {value.get('_PID')}", text, is_piece


def _is_open(text: bytes) -> bool:
    """Whether a JSON value begins in a text and does not end."""
    match = _BODY.search(_COLOURS.sub(b"", text))
    begun = match[1] if match else text.strip()
    if not begun.startswith(b"{"):
        return False
    try:
        json.loads(begun.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return False


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that a whole line is; None where it is something else."""
    if not text.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return None
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text_in(record: Mapping[str, Any]) -> bytes | None:
    """The line in a collector's record; journald has one with colours as a list of bytes."""
    for name in _TEXT_FIELDS:
        value = record.get(name)
        if isinstance(value, str):
            return value.encode(errors="surrogatepass")
        if name == "MESSAGE" and isinstance(value, list):
            with contextlib.suppress(TypeError, ValueError):
                return bytes(value)
    return None


def _parsed(text: bytes) -> Found:
    """A body; bytes that are not UTF-8, or no whole JSON, as what is wrong with it."""
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        return Unusable("not_utf8", error)
    except (ValueError, RecursionError):
        return Unusable("cut_off", "the body is no whole JSON")
    return dict(value)
