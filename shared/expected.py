# SPDX-License-Identifier: Apache-2.0
"""What pydantic finds wrong with a value, in plain words: what was expected, and what was found."""

import reprlib
from collections.abc import Mapping
from typing import Any

# By pydantic's names for what is wrong; what stands in braces is its own.
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {limit}",
    "greater_than_equal": "at least {limit}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a number of fewer digits",
    "int_type": "a whole number",
    "invalid_key": "text as every key",
    "less_than": "less than {limit}",
    "less_than_equal": "at most {limit}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "missing": "such a key",
    "model_type": "a mapping",
    "path_type": "a path",
    "string_type": "text",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "tuple_type": "a list",
}

_KINDS = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "text",
    tuple: "a list",
    type(None): "nothing",
}


def expected(problem: Mapping[str, Any]) -> str | None:
    """What should have been there; None where the check has words of its own."""
    known = _EXPECTED.get(problem["type"])
    limit = problem["msg"].rpartition(" ")[2]  # as it is written, not as a float
    return None if known is None else known.format(limit=limit, **problem.get("ctx", {}))


def found(problem: Mapping[str, Any]) -> str:
    """What was there instead."""
    if problem["type"] == "missing":
        return "none"
    # Of a mapping; its values may be secrets.
    if problem["type"] in ("dict_type", "string_type"):
        return _KINDS.get(type(problem["input"]), "something else")
    length = problem.get("ctx", {}).get("actual_length")
    return reprlib.repr(problem["input"]) if length is None else f"{length}"


def wrong(problem: Mapping[str, Any]) -> str:
    """`expected a whole number, found 'x'`, or the words of a check with what it found."""
    what = expected(problem)
    said = problem["msg"].removeprefix("Value error, ") if what is None else f"expected {what}"
    return f"{said}, found {found(problem)}"
