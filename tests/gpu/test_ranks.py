# SPDX-License-Identifier: Apache-2.0
"""One rank on each card there is, under DDP and FSDP2: one CPU process's loss and gradients."""

from pathlib import Path

import pytest
import torch

from tests.ranks import CASES
from tests.stages.train.test_ranks import relative, run_ranks

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_ranks_on_cards_give_the_cpu_s_loss_and_gradients(
    device: torch.device, how: str, tmp_path: Path
) -> None:
    cards = torch.cuda.device_count() if device.type == "cuda" else 0
    if how == "fsdp2" and cards < 2:
        pytest.skip("one rank shares nothing")
    folders = {"cpu": tmp_path / "cpu", "cards": tmp_path / "cards"}
    for folder in folders.values():
        folder.mkdir()
    run_ranks(folders["cpu"], 1, "ddp")
    run_ranks(folders["cards"], max(1, cards), how, on_cpu=not cards)
    for case in CASES:
        expected, found = (
            torch.load(f / f"{case}.pt", weights_only=True) for f in folders.values()
        )
        assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        for name, gradient in expected["gradients"].items():
            assert relative(found["gradients"][name].cpu(), gradient) < TOLERANCE, name
