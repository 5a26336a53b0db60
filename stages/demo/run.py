# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's target."""

import logging

from stages.demo.config import MakeTargetConfig

logger = logging.getLogger(__name__)


def run(config: MakeTargetConfig) -> None:
    """Make the demo's target, or find it made."""
    from stages.demo.make_target import make_target

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
