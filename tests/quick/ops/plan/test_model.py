# SPDX-License-Identifier: Apache-2.0
"""What follows from a target's architecture: its kind, its head, the disk it takes."""

import pytest

from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan
from tests.quick.ops.plan.well_known import CONFIGS, KNOWN, plan_of


def test_every_config_is_known() -> None:
    assert sorted(KNOWN) == sorted(path.stem for path in CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_target_is(name: str) -> None:
    plan = plan_of(name)
    total, kinds, backend, width = KNOWN[name]
    assert plan.weights.parameters == total
    assert plan.target.kinds == kinds
    assert plan.backend[0] == backend
    assert plan.head.intermediate_size == width


def test_disk_worked_by_hand() -> None:
    raw = {
        "model_type": "llama",
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 7,
        "num_attention_heads": 1,
        "vocab_size": 10,
    }
    plan = make_plan("toy", understand(raw, "toy"))
    # Two embeddings, seven layers of 4 x 16 + 3 x 32 and two norms, the final norm.
    assert plan.weights.parameters == 80 + 7 * (4 * 16 + 3 * 32 + 8) + 4
    assert plan.disk_bytes(3, 5) == 3 * 5 * 4 * 4 * 2  # samples, tokens, states, H, bytes
