# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's target, where the packages for it are."""

import logging

from shared.errors import UserError
from stages.ops.config import MakeTargetConfig

_NEEDED = ("tokenizers", "torch", "transformers")  # what make_target imports

logger = logging.getLogger(__name__)


def run(config: MakeTargetConfig) -> None:
    """Make the demo's target, or find it made.

    Raises:
        UserError: this environment has no torch.
    """
    try:
        from stages.ops.demo.make_target import make_target
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise UserError(
            f"make-target trains a model and needs {', '.join(_NEEDED)}; {error.name} is not "
            "installed here, as in the ops image. Run it where train runs: `make setup`, or with "
            "compose/demo.yaml."
        ) from error

    steps = {} if config.steps is None else {"steps": config.steps}
    facts = make_target(
        config.out,
        seed=config.seed,
        num_prompts=config.num_prompts,
        num_held_out=config.num_held_out,
        **steps,
    )
    logger.info(
        "target at %s: %d parameters, mean next-token entropy %.3f nats, %.0f %% distinct answers",
        config.out,
        facts.parameters,
        facts.mean_entropy_nats,
        100 * facts.distinct_answers,
    )
