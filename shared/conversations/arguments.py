# SPDX-License-Identifier: Apache-2.0
"""Where a tool call's arguments end in rendered text: as JSON, as JSON in a string, or item by item."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from shared.conversations.template import TemplateMismatch, parsed_arguments

_DECODER = json.JSONDecoder()
_Order = Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]
# As given; sorted; sorted as Jinja's `dictsort` does. Inner mappings are in the same order.
_ORDERS: tuple[_Order, ...] = (
    lambda mapping: mapping.items(),
    lambda mapping: sorted(mapping.items(), key=lambda item: item[0]),
    lambda mapping: sorted(mapping.items(), key=lambda item: item[0].lower()),
)


def all_arguments_end(
    text: str,
    calls: Sequence[Mapping[str, Any]],
    names: Sequence[tuple[int, int]],
    start: int,
    stop: int,
) -> int:
    """One past the arguments of all of an answer's calls, each seen behind its name or before it.

    Args:
        names: start and end of each call's name.
        start, stop: where the answer begins, and where it has ended.

    Raises:
        TemplateMismatch: those of one call are not all there.
    """
    before, last = start, start
    nexts = [begin for begin, _ in names[1:]] + [stop]
    for call, (begin, end), until in zip(calls, names, nexts, strict=True):
        arguments = parsed_arguments(call["function"].get("arguments"))
        found = arguments_end(text, end, min(until, stop), arguments)
        if found is None and arguments_end(text, before, begin, arguments) is None:
            raise TemplateMismatch("a tool call's arguments are left out by the template")
        before = found or end
        last = max(last, before)
    return last


def arguments_end(text: str, start: int, stop: int, arguments: Any) -> int | None:
    """One past the arguments in `text[start:stop]`; None where they are not all there.

    Args:
        arguments: a mapping, or text that is no JSON object.

    Raises:
        TemplateMismatch: a mapping is shown in Python's spelling.
    """
    window = text[start:stop]
    if isinstance(arguments, str):
        index = window.find(arguments)
        return start + index + len(arguments) if index >= 0 else None
    if arguments and str(arguments) in window and str(arguments) != json.dumps(arguments):
        # Printed by a template that wants JSON text: nobody says it in Python's spelling.
        raise TemplateMismatch("a tool call's arguments are shown in Python's spelling")
    for index, value, end in _json_values(window):
        if value == arguments or _is_json_of(value, arguments):
            return start + index + end
    for order in _ORDERS:
        if (found := _after_items(window, 0, arguments, order)) is not None:
            return start + found
    return None


def _json_values(window: str) -> Iterator[tuple[int, Any, int]]:
    for index, character in enumerate(window):
        if character in '{"':
            try:
                value, end = _DECODER.raw_decode(window[index:])
            except (ValueError, RecursionError):
                continue
            yield index, value, end


def _is_json_of(value: Any, arguments: Any) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return False
    try:
        return bool(json.loads(value) == arguments)
    except (ValueError, RecursionError):
        return False


def _after_items(window: str, position: int, mapping: dict[str, Any], order: _Order) -> int | None:
    """The position after every key and value in turn, however they are spelled."""
    for key, value in order(mapping):
        index = window.find(key, position)
        if index < 0:
            return None
        found = _after_value(window, index + len(key), value, order)
        if found is None:
            return None
        position = found
    return position


def _after_value(window: str, position: int, value: Any, order: _Order) -> int | None:
    ends = [
        index + len(text)
        for text in _spellings(value)
        if (index := window.find(text, position)) >= 0
    ]
    if ends:
        return min(ends)
    if isinstance(value, dict):
        return _after_items(window, position, value, order)
    if isinstance(value, list):
        for each in value:
            found = _after_value(window, position, each, order)
            if found is None:
                return None
            position = found
        return position
    return None


def _spellings(value: Any) -> set[str]:
    if isinstance(value, str):
        escaped = {json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)}
        return {value, value.strip(), repr(value)[1:-1], *escaped}
    return {
        str(value),
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, separators=(",", ":"), ensure_ascii=False),
    }
