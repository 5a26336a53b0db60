# SPDX-License-Identifier: Apache-2.0
"""Wrong states have a short list of causes: which one is it?

Each known fault leaves a trace: once it is undone, the rebuilt log-probabilities equal the engine's
again. So every fault that can be undone from what is stored is tried out, not guessed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch

from shared.errors import OutputError
from stages.dump.checks.checks import (
    Agreement,
    Probe,
    ShardChecks,
)

_SCALES = torch.logspace(-6, 6, 49, base=2.0).tolist()
_SOFTCAPS = (15.0, 30.0, 50.0)
_MAX_OTHER_ROWS = 64
# A state of a wrong layer still tells its own token from the others; one of wrong tokens does not.
_STILL_ITS_OWN = 0.7


def require_right(
    name: str,
    checks: ShardChecks,
    agreement: Agreement,
    probes: Mapping[int, torch.Tensor],
    *,
    min_agreement: float,
    max_logprob_gap: float,
) -> float | None:
    """Refuse a shard whose states are not those of the target that answered.

    Args:
        probes: row -> its log-probabilities by the engine, [T_row-1].

    Returns:
        the largest mean gap of a probe row, in nats; None where the backend reports none.

    Raises:
        OutputError: with the fault that it looks like.
    """
    gaps = checks.gaps(probes)
    worst = max(gaps, key=lambda row: _or_infinity(gaps[row]), default=None)
    if worst is not None and _or_infinity(gaps[worst]) > max_logprob_gap:
        fault = name_fault(checks, worst, probes[worst], max_logprob_gap)
        sample_id = checks.rows.sample_ids[worst]
        raise OutputError(
            f"{name}: log-probabilities rebuilt from the stored final states differ from the "
            f"engine's own by {gaps[worst]:.2f} nats on average in sample {sample_id}, expected at "
            f"most {max_logprob_gap}. It looks like {fault}. Nothing of this shard was kept.",
            code="states-logprob-gap",
            remedy="Compare the layers with python -m stages.dump parity, or set backend: hf.",
            facts={"sample": sample_id, "max_logprob_gap": max_logprob_gap, "fault": fault},
        )
    if agreement.share < min_agreement:
        raise OutputError(
            f"{name}: the target's argmax from the stored final states equals the greedy answer "
            f"token in {agreement.share:.1%} of {agreement.positions} positions, expected at least "
            f"{min_agreement:.0%}. On the probe rows the states are what this engine computes, so "
            "it looks like another target, another revision or sampling gave these answers; or, if "
            "only other rows are wrong, like mixed-up requests. Nothing of this shard was kept.",
            code="states-disagree",
            remedy="Run synth again with this target, or lower dump.min_agreement if the answers "
            "were not greedy.",
            facts={"agreement": agreement.share, "min_agreement": min_agreement},
        )
    return None if worst is None else gaps[worst]


def _or_infinity(gap: float) -> float:
    """`gap`, so that a NaN counts as the worst."""
    return math.inf if math.isnan(gap) else gap


def name_fault(checks: ShardChecks, row: int, reported: torch.Tensor, tolerance: float) -> str:
    """In words, the known fault that explains row `row` best."""
    probe = checks.probe(row, reported)
    missing = ~probe.states[:, -1].any(dim=-1)  # [T_row]
    if bool(missing.any()):
        length = int(missing.sum())
        if length < missing.numel() and bool(missing[:length].all()):
            return f"a prefix cache: the first {length} tokens have no states"
        return f"zero states: {length} of {missing.numel()} tokens have none"
    for fault, rebuilt in _undone(checks, row, probe):
        if probe.gap(rebuilt) <= tolerance:
            return fault
    final = probe.states[probe.positions, -1]
    own = probe.gap(checks.tensors.logits(final))
    foreign = probe.gap(checks.tensors.logits(final.roll(1, dims=0)))
    if own < _STILL_ITS_OWN * foreign:
        return "a shifted layer: the states fit their tokens, and are not the last layer's"
    return "mixed-up requests: the states belong to tokens that this shard does not hold"


def _undone(checks: ShardChecks, row: int, probe: Probe) -> Iterator[tuple[str, torch.Tensor]]:
    """(fault, logits [n, V] as they would be without it), for each fault that can be undone."""
    tensors = checks.tensors
    final = probe.states[probe.positions, -1]
    yield (
        "a missing norm: the states were taken after the final norm, not before it",
        tensors.head_logits(final),
    )
    for offset in (1.0, -1.0):
        norm = dataclasses.replace(tensors.norm, weight=tensors.norm.weight.float() + offset)
        yield (
            f"a norm that multiplies by weight {offset:+.0f}: the states are right, and the engine "
            "norms them otherwise than transformers' class",
            tensors.head_logits(norm(final)),
        )
    for slot in range(probe.states.shape[1] - 1):
        wrong = probe.states[probe.positions, slot]
        yield (
            f"layers in a wrong order: slot {slot} is the final state",
            tensors.logits(wrong),
        )
    for step, when in ((1, "late"), (-1, "early")):
        neighbour = (probe.positions + step).clamp(0, probe.states.shape[0] - 1)
        yield (
            f"states shifted by a token: each is stored one token {when}",
            tensors.logits(probe.states[neighbour, -1]),
        )
    yield from _of_other_rows(checks, row, probe)
    values = tensors.logits(final)
    for scale in _SCALES:
        yield (
            f"a logit scale of {scale:.3g} that transformers' class does not have: the states are right",
            values * scale,
        )
    for cap in _SOFTCAPS:
        yield (
            f"a softcap of {cap:.0f} that transformers' class does not have: the states are right",
            torch.tanh(values / cap) * cap,
        )


def _of_other_rows(
    checks: ShardChecks, row: int, probe: Probe
) -> Iterator[tuple[str, torch.Tensor]]:
    """The states that lie where another sample's should."""
    for other in range(min(len(checks.rows.input_ids), _MAX_OTHER_ROWS)):
        states = checks.states[checks.starts[other] : checks.starts[other + 1], -1]
        if other == row or states.shape[0] <= int(probe.positions[-1]):
            continue
        yield (
            f"mixed-up requests: its states lie at sample {checks.rows.sample_ids[other]}",
            checks.tensors.logits(states[probe.positions]),
        )
