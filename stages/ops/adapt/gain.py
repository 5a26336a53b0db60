# SPDX-License-Identifier: Apache-2.0
"""The two benches of an adaptation -> whether the new head is the better one.

In: the old head's bench and the new one's, over the same held-out chats. Out: figures as JSON values. The
rule: the acceptance length rose by the asked gain or more, and the gain's 95 % interval, over draws of the
chats with both heads' answers, lies above 0. The first alone passes heads that are no better on three of
ten sets of 8 chats; an interval above the asked gain would refuse four of ten heads that are 5 % better,
even on 64 chats.
"""

import logging
from collections.abc import Mapping
from typing import Any

from shared.contracts.bench_report import read_answers, read_report
from shared.paths import RunPaths
from shared.vllm.intervals import gain_interval, speedup_interval

_SEED = 0

logger = logging.getLogger(__name__)


def compare(before: RunPaths, after: RunPaths, min_gain: float) -> dict[str, Any]:
    """Both heads' figures, the gain, and whether it is one: `improved`. Warns of what makes it doubtful.

    `gain`: relative (0.02 is 2 %); `speed_change`: tokens/s after / before; intervals are [low, high] at
    95 %, None where they cannot be computed.

    Raises:
        UserError: a report or its answers cannot be read.
    """
    result: dict[str, Any] = {"min_gain": min_gain}
    for label, paths in (("before", before), ("after", after)):
        measured = read_report(paths.report)["head"]
        result[label] = measured["acceptance"]["acceptance_length"]
        result[f"{label}_interval"] = measured["acceptance"]["acceptance_length_interval"]
        result[f"{label}_tokens_per_s"] = measured["tokens_per_s"]
    old, new = (read_answers(paths.stage("bench")) for paths in (before, after))
    ratio = result["after_tokens_per_s"] / result["before_tokens_per_s"]
    result |= {
        "gain": result["after"] / result["before"] - 1,
        "gain_interval": gain_interval(new, old, seed=_SEED),
        "speed_change": ratio,
        "speed_change_interval": speedup_interval(new, old, speedup=ratio, seed=_SEED),
    }
    is_enough = result["after"] >= (1 + min_gain) * result["before"]
    bounds = result["gain_interval"]
    result["improved"] = is_enough and (bounds is None or bounds[0] > 0)
    _warn(result)
    return result


def _warn(result: Mapping[str, Any]) -> None:
    if result["gain_interval"] is None:
        logger.warning(
            "the gain has no interval: the server did not count drafts by request (vLLM before 0.30), or "
            "there was one chat alone. A gain by luck is not told from a real one"
        )
    bounds = result["speed_change_interval"]
    if bounds is not None and bounds[1] < 1:
        logger.warning(
            "the new head is slower: tokens/s %.1f before, %.1f after, %.2f times (95 %% interval over the "
            "chats %.2f to %.2f). Other work on the machine during one of the benches looks the same: before "
            "you change heads, measure both again on an idle one",
            result["before_tokens_per_s"],
            result["after_tokens_per_s"],
            result["speed_change"],
            *bounds,
        )


def rule(min_gain: float, chats: int) -> str:
    """What a new head must reach, in words."""
    return (
        f"a gain in acceptance length of {min_gain:.0%} or more, whose 95 % interval over the {chats} "
        "held-out chats lies above 0"
    )


def told(result: Mapping[str, Any]) -> str:
    """`acceptance_length=2.00->2.05 gain=+2.5% interval=-1.0%..+6.1% tokens_per_s=100.0->99.0`."""
    bounds = result["gain_interval"]
    interval = "unknown" if bounds is None else "..".join(f"{bound:+.1%}" for bound in bounds)
    return (
        f"acceptance_length={result['before']:.2f}->{result['after']:.2f} gain={result['gain']:+.1%} "
        f"interval={interval} tokens_per_s={result['before_tokens_per_s']:.1f}->"
        f"{result['after_tokens_per_s']:.1f}"
    )
