# SPDX-License-Identifier: Apache-2.0
"""dump -> train: the target's hidden states as `.pt` shards that are mapped into memory.

Legend: T tokens of a shard, N its samples, A aux layers, H the target's hidden size.

    shard_00000.pt = {
        "input_ids":     int32    [T]
        "loss_mask":     uint8    [T]          1 where the target generated the token
        "hidden_states": bfloat16 [T, A+1, H]  aux layers in order, then the final one (prenorm)
        "offsets":       int64    [N+1]        sample n is the rows offsets[n]:offsets[n+1]
        "sample_ids":    list[str]
    }

With `state_dtype: fp8` (`shared/contracts/fp8.py`) three entries replace `hidden_states`:

        "hidden_states": float8_e4m3fn [T, A, H]  aux layers
        "scales":        bfloat16 [T, A]
        "final_states":  bfloat16 [T, H]

The other layout, `samples`, has one file per sample of S tokens, as in speculators 0.3:

    samples/data_7.pt = {
        "input_ids":     int64 [S]
        "hidden_states": list of A+1 bfloat16 [S, H]   aux layers in order, then the final one
        "loss_mask":     int64 [S]
    }                                          fp8: aux layers float8 [S, H], "scales" bfloat16 [S, A]

They have a folder of their own, since speculators reads every `.pt` below its folder.

Files have only tensors and plain lists, and are loaded with weights_only=True and mmap=True. Opening a
shard reads nothing but its directory; a file with anything else is refused unread.
"""

import ctypes
import dataclasses
import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from shared.contracts import fp8
from shared.errors import UserError
from shared.io.records import Shape, read_record
from shared.io.tensor_files import is_dense, load_tensors, save_tensors, wrong

SCHEMA_VERSION = 1
DATA_CONFIG = "data_config.json"
TOKEN_FREQ = "token_freq.pt"
SAMPLES = "samples"
_REMEDY = "Restore the file, or delete it and run dump again."


class _HiddenStates(Shape):
    layer_ids: Annotated[list[int], Field(min_length=2)]
    aux_layer_ids: list[int]


class _Model(Shape):
    hidden_size: Annotated[int, Field(gt=0)]
    vocab_size: Annotated[int, Field(gt=0)]


class _DataConfig(Shape):
    hidden_states: _HiddenStates
    model: _Model


def read_data_config(dump_folder: Path) -> dict[str, Any]:
    """Read dump's description of its states.

    Raises:
        UserError: the file is missing, or a key that readers need.
    """
    return read_record(dump_folder / DATA_CONFIG, _DataConfig, remedy=_REMEDY)


def shard_name(index: int) -> str:
    """File name of shard `index`."""
    return f"shard_{index:05d}.pt"


def sample_name(index: int) -> str:
    """Name, in the artifact, of sample `index` in the layout `samples`."""
    return f"{SAMPLES}/data_{index}.pt"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard, its tensors mapped from the file."""

    input_ids: torch.Tensor  # [T] int32
    loss_mask: torch.Tensor  # [T] uint8
    hidden_states: torch.Tensor  # [T, A+1, H] bfloat16, or [T, A, H] float8: read it by `states`
    offsets: torch.Tensor  # [N+1] int64
    sample_ids: list[str]
    scales: torch.Tensor | None = None  # with float8: [T, A] bfloat16
    final_states: torch.Tensor | None = None  # with float8: [T, H] bfloat16

    def __len__(self) -> int:
        return len(self.sample_ids)

    def rows(self, index: int) -> slice:
        """The rows of sample `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def states(self, rows: slice) -> torch.Tensor:
        """The mapped states [S, A+1, H] of a sample; the kernel starts to read them from the disk.

        A caller that asks for several samples before it copies the first keeps the disk busy.
        """
        states = self.hidden_states[rows]
        _fetch(states)
        if self.scales is None or self.final_states is None:
            return states
        aux = fp8.decode(states, self.scales[rows])
        return torch.cat([aux, self.final_states[rows, None]], dim=1)

    def final(self) -> torch.Tensor:
        """The final states [T, H] bfloat16, mapped."""
        return self.hidden_states[:, -1] if self.final_states is None else self.final_states


def _fetch(tensor: torch.Tensor) -> None:
    """Ask the kernel to read all pages of a mapped, contiguous tensor.

    Otherwise every page fault reads about 128 KiB and waits, and the disk is idle in between. If the
    kernel refuses, reading is only slower.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_WILLNEED))


def write_shard(
    path: Path,
    *,
    input_ids: Sequence[Sequence[int]],
    loss_masks: Sequence[Sequence[int]],
    states: torch.Tensor | Sequence[torch.Tensor],
    sample_ids: Sequence[str],
    state_dtype: str = "bfloat16",
) -> None:
    """Write samples as one shard, atomically; `states` is [T, A+1, H], or a list to concatenate."""
    if not isinstance(states, torch.Tensor):
        states = torch.cat(list(states))
    lengths = torch.tensor([0, *(len(ids) for ids in input_ids)], dtype=torch.int64)
    flat_ids = [token for ids in input_ids for token in ids]
    flat_mask = [bit for mask in loss_masks for bit in mask]
    shard: dict[str, Any] = {
        "input_ids": torch.tensor(flat_ids, dtype=torch.int32),
        "loss_mask": torch.tensor(flat_mask, dtype=torch.uint8),
        "offsets": lengths.cumsum(0),
        "sample_ids": list(sample_ids),
    }
    if state_dtype == "bfloat16":
        shard["hidden_states"] = states.to(torch.bfloat16).contiguous()
    else:
        shard["hidden_states"], shard["scales"] = fp8.encode(states[:, :-1])
        shard["final_states"] = states[:, -1].contiguous()
    save_tensors(path, shard)


def _check(shard: Shard, num_states: int, hidden_size: int) -> None:
    dtypes = {
        "input_ids": torch.int32,
        "loss_mask": torch.uint8,
        "hidden_states": torch.bfloat16,
        "offsets": torch.int64,
    }
    num_tokens = len(shard.input_ids)
    shapes: dict[str, tuple[int, ...]] = {"hidden_states": (num_tokens, num_states, hidden_size)}
    if shard.scales is not None or shard.final_states is not None:
        dtypes |= {
            "hidden_states": fp8.DTYPE,
            "scales": torch.bfloat16,
            "final_states": torch.bfloat16,
        }
        shapes = {
            "hidden_states": (num_tokens, num_states - 1, hidden_size),
            "scales": (num_tokens, num_states - 1),
            "final_states": (num_tokens, hidden_size),
        }
    for name, dtype in dtypes.items():
        tensor = getattr(shard, name)
        if not is_dense(tensor, dtype):
            raise ValueError(f"{name}: expected {dtype}, found {getattr(tensor, 'dtype', None)}")
    for name, shape in shapes.items():
        if tuple(getattr(shard, name).shape) != shape:
            raise ValueError(f"{name}: expected {shape}, found {tuple(getattr(shard, name).shape)}")
    if not isinstance(shard.sample_ids, list) or not all(
        isinstance(sample_id, str) for sample_id in shard.sample_ids
    ):
        raise ValueError("sample_ids: expected a list of names")
    sizes = (shard.input_ids.shape, shard.loss_mask.shape, shard.offsets.shape)
    if sizes != ((num_tokens,), (num_tokens,), (len(shard) + 1,)):
        raise ValueError("loss_mask or offsets do not fit input_ids and sample_ids")
    ends = shard.offsets.tolist()
    if ends[0] != 0 or ends[-1] != num_tokens or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"offsets: expected ascending from 0 to {num_tokens}")


def read_shard(path: Path, *, num_states: int, hidden_size: int) -> Shard:
    """Map a shard from its file and check its shapes.

    Args:
        num_states: A + 1.

    Raises:
        UserError: not such a file, or the tensors do not fit each other or data_config.json.
    """
    label, remedy = "a shard of hidden states", _REMEDY
    raw = load_tensors(path, label=label, remedy=remedy)
    try:
        if not isinstance(raw, dict):
            raise ValueError(f"expected a dict, found {type(raw).__name__}")
        shard = Shard(**raw)
        _check(shard, num_states, hidden_size)
    except (ValueError, TypeError) as error:
        raise wrong(path, error, label=label, remedy=remedy) from error
    return shard


def read_token_freq(dump_folder: Path, vocab_size: int) -> torch.Tensor:
    """[V] int64: how often each token occurs in the answers.

    Raises:
        UserError: the file is missing, damaged, or of another vocabulary.
    """
    path = dump_folder / TOKEN_FREQ
    label, remedy = f"counts of {vocab_size} tokens", _REMEDY
    counts = load_tensors(path, label=label, remedy=remedy, mmap=False)
    if not is_dense(counts, torch.int64) or counts.shape != (vocab_size,) or counts.min() < 0:
        raise UserError(
            f"{path}: expected {label}.",
            code="token-counts",
            remedy=remedy,
            facts={"file": str(path), "vocab_size": vocab_size},
        )
    checked: torch.Tensor = counts
    return checked
