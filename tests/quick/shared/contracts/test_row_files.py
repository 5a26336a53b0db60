# SPDX-License-Identifier: Apache-2.0
"""States that others made, a file a conversation: ids that would become other ids are refused."""

from pathlib import Path

import pytest
import torch

from shared.contracts.row_files import RowFile
from shared.errors import UserError


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (torch.tensor([1.5, 2.0]), r"whole numbers, found torch\.float32"),
        (torch.tensor([True, False]), r"whole numbers, found torch\.bool"),
        (torch.tensor([1, 2 + 2**32]), "32-bit numbers"),
    ],
)
def test_ids_that_would_become_others_are_refused(
    ids: torch.Tensor, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    states = torch.zeros(2, 8, dtype=torch.bfloat16)
    raw = {"hidden_states": [states] * 4, "loss_mask": torch.ones(2, dtype=torch.int64)}
    torch.save(raw | {"input_ids": torch.tensor([1, 2], dtype=torch.int16)}, path)
    assert RowFile(path, 4, 8).input_ids.tolist() == [1, 2]
    torch.save(raw | {"input_ids": ids}, path)
    with pytest.raises(UserError, match=told):
        _ = RowFile(path, 4, 8).input_ids


def test_other_names_and_shapes_are_told(tmp_path: Path) -> None:
    path, ones = tmp_path / "a.pt", torch.ones(2, dtype=torch.int64)
    torch.save({"input_ids": ones, "loss_mask": ones, "aux_hidden_state": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"found input_ids, loss_mask, aux_hidden_state\."):
        _ = RowFile(path, 4, 8).input_ids
    torch.save({"input_ids": ones[None], "loss_mask": ones[None]}, path)
    with pytest.raises(UserError, match=r"input_ids: expected a row of numbers, found \[1, 2\]"):
        _ = RowFile(path, 4, 8).input_ids
