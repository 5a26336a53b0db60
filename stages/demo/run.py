# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's target, or fetches the real one."""

import logging

from shared.runtime.process import stopping_at_once
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
    """Fetch the pretrained target and write its prompts, which are read first: they cost seconds."""
    from stages.demo.real.prompts import Asked, choose_prompts, write_prompts
    from stages.demo.real.target import make_real_target

    asked = Asked(
        given=config.prompts,
        workspace=config.workspace,
        domain=config.domain,
        rows=config.num_prompts,
        held_out=config.num_held_out,
        seed=config.seed,
    )
    with stopping_at_once("no prompts were written"):  # a hub's data set takes a while
        chosen = choose_prompts(config.out, asked, overwrite=config.overwrite)
    found = make_real_target(config.out, model=config.model, revision=config.revision)
    if chosen:
        write_prompts(config.out, chosen)
    logger.info("target at %s, from %s", config.out, found.source)
