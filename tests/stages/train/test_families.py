# SPDX-License-Identifier: Apache-2.0
"""The chain without an engine for every family: kept answers, hf states, a head, an export."""

from pathlib import Path

import pytest

from shared.errors import UserError
from tests import chains, targets

REFUSED = {"phi": "target-head-bias"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak if family.is_vision else ())
        for name, family in targets.FAMILIES.items()
    ],
)
def test_a_head_is_trained_and_exported(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(UserError) as refusal:
            chains.export(name, tmp_path)
        assert refusal.value.code == REFUSED[name]
        return
    assert (chains.export(name, tmp_path) / "model.safetensors").is_file()
