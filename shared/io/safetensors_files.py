# SPDX-License-Identifier: Apache-2.0
"""A model's safetensors files: which tensors they have, and single ones, read without the rest."""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from shared.errors import UserError
from shared.io.files import require_file
from shared.io.records import Shape, read_record, require_shape

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT_BYTES = 100 << 20
_RESTORE = "Restore it from where it comes from."


class _Index(Shape):
    weight_map: dict[str, str]


class _Tensor(Shape):
    """One entry of a safetensors header."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def read_header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: name -> {dtype, shape, data_offsets}.

    Raises:
        UserError: the header does not fit the file.
    """
    require_file(path)
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(_HEADER_LIMIT_BYTES, path.stat().st_size):
                raise ValueError(f"header claims {length} bytes")
            header = json.loads(handle.read(length))
        room = path.stat().st_size - 8 - length
    except (OSError, struct.error, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a safetensors file, found: {error}. {_RESTORE}"
        ) from error
    tensors = require_shape(header, Shape, where=str(path), remedy=_RESTORE)
    for name, facts in tensors.items():
        if name != "__metadata__":
            where = f"{path}: {name!r}"
            start, end = require_shape(facts, _Tensor, where=where, remedy=_RESTORE)["data_offsets"]
            if start > end or end > room:
                raise UserError(
                    f"{where}: expected its data within {room} bytes, found {start} to {end}. "
                    f"{_RESTORE}"
                )
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found: dict[str, str] = read_record(index, _Index, remedy=_RESTORE)["weight_map"]
        for name in found.values():
            if Path(name).name != name or not name.isprintable():
                raise UserError(f"{index}: expected names of files beside it, found {name!r:.99}.")
        return found
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither."
        )
    return dict.fromkeys(
        (name for name in read_header(single) if name != "__metadata__"), single.name
    )


def read_tensor(folder: Path, names: tuple[str, ...]) -> "torch.Tensor | None":
    """The first of `names` that a model's folder has, or None.

    Raises:
        UserError: the files are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    weight_map = _weight_map(folder)
    for name in names:
        if name not in weight_map:
            continue
        path = folder / weight_map[name]
        require_file(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: could not read {name}: {error}") from error
    return None
