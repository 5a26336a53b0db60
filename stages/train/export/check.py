# SPDX-License-Identifier: Apache-2.0
"""Can a training start from `init_from`? In: the head, the target and the settings; no states."""

import logging

from shared.contracts import layers
from shared.errors import UserError
from shared.target import model as target
from stages.train.commands import CheckHeadConfig
from stages.train.export import warm_start

logger = logging.getLogger(__name__)


def run(config: CheckHeadConfig) -> None:
    """Load the head as a training would.

    Raises:
        UserError: there is none, or it does not fit the target, the settings, or what train makes.
    """
    from shared.target.tensors import read_tensors

    if config.init_from is None:
        raise UserError(
            "train.init_from: expected a head to start from, found none.",
            code="warm-start-missing",
            remedy="Give --init_from.",
        )
    located = target.locate_trained(config.run, config.workspace)
    found = target.read_config(located, trust_remote_code=config.run.trust_remote_code)
    tensors = read_tensors(found)
    default = layers.resolve_aux_layers(None, found.num_layers)
    wanted = layers.resolve_aux_layers(config.run.aux_layers, found.num_layers)
    warm_start.load(config, tensors.embed_tokens, tensors.lm_head, wanted, default)
    logger.info("a training can start from %s", config.init_from)
