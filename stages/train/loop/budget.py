# SPDX-License-Identifier: Apache-2.0
"""How many optimizer steps a training makes, and at which rate.

In: the tokens of the dump, and the settings. Out: batch size and learning rate where the recipe leaves
them at `auto`, warm-up, and the step at which a training that no longer improves ends. The rule was
measured: `tests/perf/grid.py`, its table in the README.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from shared.runtime.wording import counted
from stages.train.config import TrainConfig

# Steps matter more than their size: the best cell of every grid that was measured has 512 tokens a step.
STEPS_WANTED = 512
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 512, 16_384
# A wider head takes a lower rate. AdamW moves each weight by the rate, so that a step's effect grows with
# the width; Muon's step has a spectral norm that grows with the width's root.
ADAMW_RATE_TIMES_WIDTH, ADAMW_MAX_RATE = 1.15, 6e-3
MUON_RATE_TIMES_ROOT_WIDTH, MUON_MAX_RATE = 0.1, 1e-2
WARM_START_SHARE = 0.25  # of the rate of a new head
WARMUP_SHARE, MAX_WARMUP_STEPS = 0.02, 1000
FEW_STEPS = 100  # below this the walked acceptance length is still rising steeply
MIN_PLATEAU_WALKS = 5

C = TypeVar("C", bound=TrainConfig)
logger = logging.getLogger(__name__)


def resolved(config: C, dump: Mapping[str, Any], hidden_size: int) -> C:
    """The same settings with a number wherever `auto` was.

    Args:
        dump: its manifest.
        hidden_size: of the target.
    """
    rows = max(1, int(dump["counts"]["ok"]))
    tokens = config.epochs * int(dump["facts"].get("tokens", 0))
    tokens = tokens * training_rows(config, dump) // rows
    chosen: dict[str, int | float] = {}
    if config.batch_tokens == "auto":
        chosen["batch_tokens"] = batch_tokens(tokens)
    if config.learning_rate == "auto":
        chosen["learning_rate"] = rate(
            hidden_size, config.optimizer, is_warm=config.init_from is not None
        )
    return config.model_copy(update=chosen)


def training_rows(config: TrainConfig, dump: Mapping[str, Any]) -> int:
    """Rows of the dump that are trained on: all but the held-out ones, max_samples at most."""
    rows = max(1, int(dump["counts"]["ok"]))
    held = min(round(rows * config.holdout_fraction), config.max_holdout_samples)
    return min(rows - held, config.max_samples or rows)


def batch_tokens(num_tokens: int) -> int:
    """Tokens of a step, a power of two, of a training over `num_tokens`, all epochs together.

    Worked example: 760,000 / 512 = 1,484, so 1,024 tokens a step, which makes 742 steps.
    """
    power = 2 ** math.floor(math.log2(max(1.0, num_tokens / STEPS_WANTED)))
    return min(max(power, MIN_BATCH_TOKENS), MAX_BATCH_TOKENS)


def rate(hidden_size: int, optimizer: str, *, is_warm: bool) -> float:
    """Peak learning rate, to two digits.

    Worked example, AdamW, hidden size 4,096: 1.15 / 4,096 = 2.8e-4, and 7e-5 for a warm start. Muon:
    0.1 / 64 = 1.6e-3, and 3.9e-4.
    """
    if optimizer == "muon":
        new = min(MUON_RATE_TIMES_ROOT_WIDTH / math.sqrt(hidden_size), MUON_MAX_RATE)
    else:
        new = min(ADAMW_RATE_TIMES_WIDTH / hidden_size, ADAMW_MAX_RATE)
    return float(f"{(WARM_START_SHARE if is_warm else 1.0) * new:.2g}")


def adamw_rate(config: TrainConfig, hidden_size: int) -> float:
    """Of lm_head and the norms beside Muon: the rate as set, at most what AdamW alone would be given."""
    highest = rate(hidden_size, "adamw", is_warm=config.init_from is not None)
    return min(float(config.learning_rate), highest)


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """As set, else 2 % of the steps, at most 1,000; always fewer than all steps."""
    wanted = config.warmup_steps
    if wanted is None:
        wanted = min(round(WARMUP_SHARE * total_steps), MAX_WARMUP_STEPS)
    return min(wanted, total_steps - 1)


def is_on_plateau(config: TrainConfig, step: int, best_step: float, total_steps: int) -> bool:
    """Whether the walks have stopped improving, asked after the walk at `step`.

    A function of the steps alone, so that a resumed training ends where an undisturbed one does.

    Worked example: a walk every 100 steps of 4,000, share 0.25, best at step 2,000: at step 3,000.
    """
    if config.plateau_fraction is None or step % config.eval_every_steps:
        return False
    patience = max(
        config.plateau_fraction * total_steps, MIN_PLATEAU_WALKS * config.eval_every_steps
    )
    return step - best_step >= patience


def tell(config: TrainConfig, total_steps: int, warmup: int) -> None:
    """Log what the settings come to, and warn where that is too little to learn from."""
    logger.info(
        "%s of %s tokens, learning rate %s after %s, %s at most",
        counted(total_steps, "step"),
        config.batch_tokens,
        config.learning_rate,
        counted(warmup, "warm-up step"),
        counted(config.epochs, "epoch"),
    )
    if total_steps < FEW_STEPS:
        advice = "Train on more rows, or raise train.epochs"
        if config.max_steps is not None and total_steps >= config.max_steps:
            advice = "Raise train.max_steps; for a curve of a recipe without it, train.epochs"
        elif config.batch_tokens != MIN_BATCH_TOKENS:
            advice += ", or lower train.batch_tokens"
        few = counted(total_steps, "step")
        logger.warning("only %s: expect a low acceptance length. %s", few, advice)
