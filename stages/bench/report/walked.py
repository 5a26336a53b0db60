# SPDX-License-Identifier: Apache-2.0
"""The walked acceptance length of the training beside the served one, where they measure the same.

The walk is greedy and has a draft length of its own (train.walk_tokens). So greedy answers alone are
compared with it, over the positions that both drafts have.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Report = Mapping[str, Any]


class Lengths(NamedTuple):
    """What was walked and what was served, of drafts of one length.

    Attributes:
        highest: the upper end of the served length's interval.
        over: which draft tokens are counted; '' for all.
    """

    walked: float
    served: float
    highest: float
    over: str


def comparable(report: Report, train: Report, shares: Sequence[float] | None) -> Lengths | None:
    """The walked and the served acceptance length over the positions of both; None if there are none.

    Worked example: a walk with K = 3 whose drafts were accepted up to each position in 0.8, 0.6 and 0.4
    of the cases, and K = 1 in vLLM with 0.79: 1.80 and 1.79, over the first draft token.
    """
    drafted, trained = report["num_speculative_tokens"], train["settings"].get("walk_tokens")
    if report["temperature"] != 0 or trained is None:
        return None
    both = min(drafted, trained)
    walked = train["facts"]["walked_acceptance_length"]
    if both < trained:
        if shares is None or len(shares) != trained:
            return None
        walked = 1 + sum(shares[:both])
    known = report["head"]["acceptance"]
    served = whole = known["acceptance_length"]
    if both < drafted:
        served = 1 + sum(known["per_position"][:both])
    # Of a longer draft it is wider than its first positions' own would be.
    above = (known["acceptance_length_interval"] or [whole, whole])[1] - whole
    first = "token" if both == 1 else f"{both} tokens"
    over = "" if drafted == trained else f" (counting the first {first} of a draft)"
    return Lengths(walked, served, served + above, over)
