# SPDX-License-Identifier: Apache-2.0
"""JSON files that one stage writes and another reads: every key that is used holds what it should.

A file on a shared volume may be cut, flipped, edited or somebody else's. So its shape is a pydantic
model of the keys that are read; others are left as they are. No conversions: a number in quotes is a
fault, and so is NaN, which JSON does not have.
"""

from pathlib import Path
from typing import Any

import pydantic

from shared.errors import UserError
from shared.expected import wrong
from shared.io import files


class Shape(pydantic.BaseModel):
    """What is expected of a JSON object, or of a part of it."""

    model_config = pydantic.ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def read_record(path: Path, shape: type[Shape], *, remedy: str) -> dict[str, Any]:
    """The object in `path`, as it stands there.

    Args:
        remedy: what to do where it is something else.

    Raises:
        UserError: no such file, not JSON, or a key that holds something else; it is named.
    """
    return require_shape(files.read_json(path), shape, where=str(path), remedy=remedy)


def read_record_if_there(path: Path, shape: type[Shape], *, remedy: str) -> dict[str, Any] | None:
    """As `read_record`; None where there is no such file, also if another process removed it just now.

    Raises:
        UserError: not JSON, or a key that holds something else; it is named.
    """
    try:
        return read_record(path, shape, remedy=remedy)
    except UserError as error:
        if error.code == "file-missing":
            return None
        raise


def require_shape(raw: Any, shape: type[Shape], *, where: str, remedy: str) -> dict[str, Any]:
    """`raw` itself, if it is such an object.

    Raises:
        UserError: a key holds something else.
    """
    try:
        shape.model_validate(raw)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(
            f"{where}: {key}: {wrong(first)}.", code="record-invalid", remedy=remedy
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{where}: nested too deeply.", code="record-invalid", remedy=remedy
        ) from error
    checked: dict[str, Any] = raw
    return checked
