# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's target, or fetches the real one."""

import logging

from stages.demo.config import MakeTargetConfig, RealTargetConfig

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


def run_real(config: RealTargetConfig) -> None:
    """Fetch the pretrained target and write its prompts."""
    from stages.demo.real.prompts import write_prompts
    from stages.demo.real.target import make_real_target

    found = make_real_target(config.out, model=config.model, revision=config.revision)
    write_prompts(
        config.out,
        given=config.prompts,
        domain=config.domain,
        rows=config.num_prompts,
        held_out=config.num_held_out,
        seed=config.seed,
        overwrite=config.overwrite,
    )
    logger.info("target at %s, from %s", config.out, found.source)
