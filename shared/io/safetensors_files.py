# SPDX-License-Identifier: Apache-2.0
"""A model's safetensors files: which tensors they have, and single ones, read without the rest."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from shared.errors import UserError
from shared.io.files import require_file
from shared.io.records import Shape, read_record

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_RESTORE = "Restore it from where it comes from."
# Bits of an element whose dtype does not end in its number of bits.
_BITS = {
    "BOOL": 8,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class _Index(Shape):
    weight_map: dict[str, str]


class TensorInfo(TypedDict):
    """One tensor of a header; dtype as safetensors spells it, e.g. BF16."""

    dtype: str
    shape: list[int]


def tensor_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor's data.

    Worked example: F4 [3, 4] has 12 elements of 4 bits, so 6 bytes.
    """
    dtype = tensor["dtype"]
    bits = _BITS.get(dtype) or int(dtype.lstrip("BCFIU").split("_")[0])
    return math.prod(tensor["shape"]) * bits // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file.

    Raises:
        UserError: missing, or no safetensors file.
    """
    with opened(path, "np") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: {"dtype": part.get_dtype(), "shape": part.get_shape()}
            for name, part in slices.items()
        }


def list_files(folder: Path) -> list[Path]:
    """The safetensors files that engines load, in order.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    single = folder / "model.safetensors"
    # The original Mistral files hold the same weights under other names.
    others = [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if not path.name.startswith(("consolidated", "adapter_model"))
    ]
    if not single.exists() and not others:
        raise UserError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither.",
            code="safetensors-missing",
            remedy="Give a target whose weights are in safetensors files, or convert them.",
            facts={"folder": str(folder)},
        )
    return [single] if single.exists() else others


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model's folder, by name, from the headers alone.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[str, TensorInfo] = {}
    for path in list_files(folder):
        found |= read_header(path)
    return found


def read_tensor(folder: Path, name: str) -> "torch.Tensor":
    """One tensor of a model's folder.

    Raises:
        UserError: the files are missing or damaged, or none holds it.
    """
    index = folder / INDEX
    if index.exists() and name in (names := _weight_map(index)):
        files = [folder / names[name]]
    else:
        files = list_files(folder)
    for path in files:
        with opened(path, "pt") as handle:
            if name in handle.keys():  # noqa: SIM118  # it is no mapping
                tensor: torch.Tensor = handle.get_tensor(name)
                return tensor
    raise UserError(
        f"{folder}: expected the tensor {name} in {', '.join(path.name for path in files[:3])}, "
        "found none.",
        code="safetensors-tensor-missing",
        remedy=_RESTORE,
        facts={"tensor": name},
    )


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """Safetensors' own handle of a file, whose tensors are numpy's (`np`) or torch's (`pt`).

    Raises:
        UserError: missing, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    require_file(path)
    try:
        with safe_open(path, framework=framework) as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected a safetensors file, found: {error}.",
            code="safetensors-damaged",
            remedy=_RESTORE,
            facts={"path": str(path)},
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    names: dict[str, str] = read_record(index, _Index, remedy=_RESTORE)["weight_map"]
    for name in names.values():
        if Path(name).name != name or not name.isprintable():
            raise UserError(
                f"{index}: expected names of files beside it, found {name!r:.99}.",
                code="safetensors-index-escapes",
                remedy=_RESTORE,
                facts={"index": str(index)},
            )
    return names
