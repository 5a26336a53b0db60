# SPDX-License-Identifier: Apache-2.0
"""What an operator must not overlook: the report's warnings about the measurement itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.bench.config import BenchConfig

# vLLM's methods that keep the target's distribution. Of others (`synthetic` in vLLM 0.32) the report warns.
EXACT_VERIFIERS = ("standard", "block")
_MAX_QUEUED_SHARE = 0.1  # of the requests' time
_MAX_CUT_SHARE = 0.1  # of the answers
_MAX_BUSY_SHARE = 0.25  # of the host's cores, by others

Report = Mapping[str, Any]


def lossy(config: BenchConfig) -> list[str]:
    """What a verifier that is not exact means for the figures."""
    method = config.speculative_args.get("rejection_sample_method", EXACT_VERIFIERS[0])
    if method in EXACT_VERIFIERS:
        return []
    return [
        f"The verifier is lossy: rejection_sample_method {method!r} accepts tokens that the target alone "
        "would not give. The acceptance length and the speed-up are not those of equal answers."
    ]


def cautions(first: Mapping[str, Report], sweep: Sequence[Report]) -> list[str]:
    """What an operator must not overlook in the figures themselves."""
    head = first["head"]
    found = []
    if head.get("speedup") is not None and head["speedup"] < 1:
        found.append(
            f"Drafting costs more than it saves here (speed-up {head['speedup']:.2f}){_cost(head)}: on a "
            "small target or a busy machine a draft takes as long as the steps that it saves."
        )
    if head["acceptance"]["acceptance_length_interval"] is None:
        found.append(
            "No interval for the acceptance length: too few prompts, or no counts by request."
        )
    found += _cut(first, sweep[0]["max_tokens"])
    for row in sweep:
        if row["queued_share"] > _MAX_QUEUED_SHARE:
            found.append(
                f"{row['drafter']} at concurrency {row['concurrency']}: requests spent "
                f"{row['queued_share']:.0%} of their time in the server's queue, so the load in the "
                "batch was lower. The server's max_num_seqs or KV cache is too small for it."
            )
    if "baseline" not in first:
        found.append("No baseline was measured: there is no speed-up, and nothing was compared.")
    return found


def _cost(head: Report) -> str:
    """What a step with its draft costs: tokens per step / speed-up plain steps."""
    steps = head.get("tokens_per_step")
    if steps is None:
        return ""
    cost = steps / head["speedup"]
    return f"; a step with its draft takes as long as {cost:.1f} plain ones, and gives {steps:.1f} tokens"


def _cut(first: Mapping[str, Report], max_tokens: int) -> list[str]:
    """How many answers at the first load end where `max_tokens` does."""
    entry, drafter = first["head"], "with the head"
    if "baseline" in first:
        entry, drafter = first["baseline"], "without a drafter"
    if entry["cut"] <= _MAX_CUT_SHARE * entry["requests"]:
        return []
    return [
        f"{entry['cut']} of the {entry['requests']} answers {drafter} are cut at max_tokens {max_tokens}: "
        f"the figures hold for the first {max_tokens} tokens of an answer. Raise bench.max_tokens to "
        "measure whole answers."
    ]


def busy(results: Mapping[str, Report]) -> list[str]:
    """Which engines were started while others used the host."""
    shares = {name: raw.get("busy_share") or 0.0 for name, raw in results.items()}
    found = [
        f"{share:.0%} of them before {name} was started"
        for name, share in shares.items()
        if share > _MAX_BUSY_SHARE
    ]
    if not found:
        return []
    return [
        f"Other processes were using CPU cores of this machine ({', '.join(found)}), which "
        "makes tokens/s, times and the speed-up unreliable. Measure again on an idle machine. CPU cores "
        "alone were looked at, no GPU."
    ]
