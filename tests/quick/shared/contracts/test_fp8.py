# SPDX-License-Identifier: Apache-2.0
"""States as e4m3: against torch's own rounding, in both layouts, and what damaged files become."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.contracts import fp8, hidden_states
from shared.contracts.row_files import RowFile
from shared.errors import UserError
from stages.dump.plan import ShardPlan, ShardRows
from stages.dump.shards.layouts import write_samples

NUM_STATES, SIZE = 4, 64
IDS = [[5, 6, 7], [8, 9, 10, 11, 12]]
MASKS = [[0, 1, 1], [0, 0, 1, 1, 1]]


def states(seed: int = 0) -> torch.Tensor:
    """[8, A+1, H] with outliers forty times the rest, as targets have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(8, NUM_STATES, SIZE, generator=generator)
    values[:, :, 3] *= 40
    return values.bfloat16()


def test_the_worked_example() -> None:
    values, scales = fp8.encode(torch.tensor([[896.0, -1.0]]).bfloat16())
    assert scales.tolist() == [2.0]
    assert values.float().tolist() == [[448.0, -0.5]]
    assert fp8.decode(values, scales).tolist() == [[896.0, -1.0]]


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_rounding_is_all_that_is_lost(factor: float) -> None:
    given = (states().float() * factor).bfloat16()
    values, scales = fp8.encode(given)
    assert scales.float().log2().frac().abs().max() == 0, "powers of two"
    expected = (given.double() / scales.double()[..., None]).to(torch.float8_e4m3fn)
    assert torch.equal(values.float(), expected.float())
    back = fp8.decode(values, scales).double()
    assert torch.equal(back, expected.double() * scales.double()[..., None]), "exact in bfloat16"
    error = (back - given.double()).norm(dim=-1) / given.double().norm(dim=-1)
    assert float(error.max()) <= 1 / 16 and float(error.median()) < 0.04
    assert float(values.float().abs().amax(-1).min()) > 200, "the range is used"


def test_zeros_stay_zeros() -> None:
    assert not fp8.decode(*fp8.encode(torch.zeros(2, 3, SIZE).bfloat16())).any()


def written(folder: Path, layout: str, given: torch.Tensor) -> list[Path]:
    plan = ShardPlan(0, 0, 2, 8, "", folder)
    rows = ShardRows(["a", "b"], IDS, MASKS)
    names = write_samples(folder, layout, plan, rows, given, [0, 3, 8], "fp8")
    return [folder / name for name in sorted(names)]


@pytest.mark.parametrize("layout", ["shards", "samples"])
def test_both_layouts_give_back_what_was_rounded(tmp_path: Path, layout: str) -> None:
    given = states()
    expected = torch.cat([fp8.decode(*fp8.encode(given[:, :-1])), given[:, -1:]], dim=1)
    paths = written(tmp_path, layout, given)
    if layout == "shards":
        shard = hidden_states.read_shard(paths[0], num_states=NUM_STATES, hidden_size=SIZE)
        assert torch.equal(shard.states(shard.rows(1)), expected[3:])
        assert torch.equal(shard.states(slice(None, None, 3)), expected[::3])
        assert torch.equal(shard.final(), given[:, -1])
        raw = torch.load(paths[0], weights_only=True)
        assert raw["hidden_states"].element_size() == 1
    else:
        found = [RowFile(path, NUM_STATES, SIZE) for path in paths]
        assert torch.equal(torch.cat([file.hidden_states for file in found]), expected)
        assert torch.equal(torch.cat([file.final() for file in found]), given[:, -1])


DAMAGE: dict[str, Any] = {
    "scales": torch.ones(8, NUM_STATES).bfloat16(),
    "final_states": torch.zeros(7, SIZE).bfloat16(),
    "hidden_states": torch.zeros(8, NUM_STATES, SIZE).bfloat16(),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("is_missing", [False, True])
def test_a_shard_that_does_not_fit_is_refused(tmp_path: Path, name: str, is_missing: bool) -> None:
    (path,) = written(tmp_path, "shards", states())
    raw = torch.load(path, weights_only=True)
    raw.pop(name)
    if not is_missing:
        raw[name] = DAMAGE[name]
    torch.save(raw, path)
    with pytest.raises(UserError, match="expected a shard of hidden states"):
        hidden_states.read_shard(path, num_states=NUM_STATES, hidden_size=SIZE)


@pytest.mark.parametrize("scales", [None, torch.ones(3, 2).bfloat16(), torch.ones(3, 3)])
def test_a_sample_whose_scales_do_not_fit_is_refused(
    tmp_path: Path, scales: torch.Tensor | None
) -> None:
    path = written(tmp_path, "samples", states())[0]
    raw = torch.load(path, weights_only=True)
    raw.pop("scales")
    if scales is not None:
        raw["scales"] = scales
    torch.save(raw, path)
    with pytest.raises(UserError, match="scales"):
        _ = RowFile(path, NUM_STATES, SIZE).hidden_states
