# SPDX-License-Identifier: Apache-2.0
"""A shard's samples on disk: one file for all, or one for each (`shared/contracts/hidden_states.py`).

Legend: S tokens of a sample, T of a shard, A aux layers, H hidden size.
"""

from pathlib import Path
from typing import Any

import torch

from shared.contracts import fp8, hidden_states
from shared.io import files
from shared.io.tensor_files import save_tensors
from stages.dump.plan import ShardPlan, ShardRows


def write_samples(
    folder: Path,
    layout: str,
    plan: ShardPlan,
    rows: ShardRows,
    states: torch.Tensor,
    starts: list[int],
    state_dtype: str = "bfloat16",
) -> dict[str, dict[str, Any]]:
    """Write a shard's samples, states [T, A+1, H], in `layout`.

    Returns:
        name -> {"bytes": size, "sha256": checksum} of each file.
    """
    if layout == "shards":
        name = hidden_states.shard_name(plan.index)
        hidden_states.write_shard(
            folder / name,
            input_ids=rows.input_ids,
            loss_masks=rows.loss_masks,
            states=states,
            sample_ids=rows.sample_ids,
            state_dtype=state_dtype,
        )
        return {name: _entry(folder / name)}
    entries = {}
    for row, (ids, mask) in enumerate(zip(rows.input_ids, rows.loss_masks, strict=True)):
        name = hidden_states.sample_name(plan.first + row)
        own = states[starts[row] : starts[row + 1]]
        # Cloned: torch.save writes the whole storage that a view belongs to.
        sample: dict[str, Any] = {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "hidden_states": [layer.clone() for layer in own.unbind(dim=1)],
            "loss_mask": torch.tensor(mask, dtype=torch.int64),
        }
        if state_dtype == "fp8":
            aux, sample["scales"] = fp8.encode(own[:, :-1])
            sample["hidden_states"][:-1] = [layer.clone() for layer in aux.unbind(dim=1)]
        save_tensors(folder / name, sample)
        entries[name] = _entry(folder / name)
    return entries


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
