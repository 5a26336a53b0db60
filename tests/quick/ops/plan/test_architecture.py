# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a target, and what its class adds."""

import pytest

from shared.errors import UserError
from stages.ops.plan.architecture import understand
from tests.quick.ops.plan.well_known import config_of, plan_of


def test_sizes_that_a_config_leaves_out_are_its_class_s() -> None:
    plan = plan_of("gemma-3-27b-it")
    assert "vocab_size" not in config_of("gemma-3-27b-it")["text_config"]
    assert plan.target.target.vocab_size == 262208
    assert plan.head.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "found list"),
        (
            {"model_type": "siglip_vision_model"},
            "expected whole numbers above 0 as num_hidden_layers",
        ),
        ({"text_config": {"hidden_size": "x"}}, "no class for the model_type None"),
    ],
)
def test_what_is_no_decoder_is_refused(raw: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        understand(raw, "config.json")
