# SPDX-License-Identifier: Apache-2.0
"""Is the head lossless? Greedy answers with and without it, token by token.

In: both engines' answers, and the plain engine to ask again. Out: every first divergence with its
position, and whether it is a tie. After a first divergence the two texts are different prompts, so
nothing is compared beyond it, nor a later turn whose prompt already differs.

A verification scores K+1 tokens of a row in one pass where plain decoding scores one, and bf16
rounds differently in another batch shape. So a divergence is a *tie* where the gap of the two tokens in
that very context is no larger than the noise that batch shapes alone make, and where they are the target's
top two, or neither is further behind its best than the noise: logits of 16 and more are multiples of 1/8 in
bf16, so three tokens may well share the top. The plain engine measures gaps and noise. Every divergent
context is scored once, alone. The noise is measured on all of them and some others, in four shapes: as a
prompt's end and as the end of a short decode, each alone and together with the others (256 at a time). It is
the largest change of a context's top-two gap between the shapes. A wrong token is nearly never among the
top two, nor within a logit of the best, so it is caught however large the noise is.

Worked example: baseline [5, 6, 7], head [5, 9, 7]: position 1, context = prompt + [5]. Logprobs
there: 6 at -0.70, 9 at -0.72; gap 0.02. Noise 0.05: a tie, also if 8 is at -0.69. With noise 0.01: wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.errors import UserError
from stages.bench.figures.metrics import first_divergence

LEAD_TOKENS = 8  # decoded before a context's end, in two of the four shapes
MAX_IN_FLIGHT = 256  # requests together, at most; the noise is measured on every context
MORE_CONTEXTS = 16  # undisturbed answers scored too, so that few divergences give a fair noise
MIN_TOGETHER = 8  # few contexts are repeated, so that together is another batch than alone
TOP = 5  # logprobs requested
MAX_BEHIND = 1.0  # logits; further behind no rounding puts a third token

Logprobs = Mapping[int, float]  # token id -> logprob, the TOP best


@dataclass(frozen=True)
class Probe:
    """Score the `num_tokens` greedy tokens that follow these ids."""

    prompt_token_ids: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Scored:
    """The tokens that followed, and the best logprobs of each step."""

    token_ids: list[int]
    logprobs: Sequence[Logprobs]


Ask = Callable[[list[Probe], int], list[Scored]]  # (probes, requests in flight)


@dataclass(frozen=True)
class Divergence:
    """Where a greedy answer first parts from the baseline's."""

    engine: str
    concurrency: int
    max_tokens: int
    id: str
    turn: int
    position: int  # index into the answer
    baseline_token: int | None
    head_token: int | None
    verdict: str = ""  # tie or wrong, once judged
    gap: float | None = None  # logits between the two tokens; None: not both among the best
    context: tuple[int, ...] = ()  # prompt and the answer up to the position


def compare(
    baseline: Sequence[Mapping[str, Any]], head: Sequence[Mapping[str, Any]], **where: Any
) -> tuple[int, int, list[Divergence]]:
    """(answers compared, answers whose prompts differ, first divergences) of one load.

    A later turn's prompt holds the answer before it, so it differs where that did.

    Raises:
        UserError: a first prompt differs, so that the two do not serve the same target.
    """
    ours = {(row["id"], row["turn"]): row for row in head}
    compared, prompts_differ, found = 0, 0, []
    for row in baseline:
        other = ours.get((row["id"], row["turn"]))
        if other is None or other["prompt_token_ids"] != row["prompt_token_ids"]:
            _require_later_turn(row, other)
            prompts_differ += 1
            continue
        compared += 1
        left, right = row["token_ids"], other["token_ids"]
        position = first_divergence(left, right)
        if position is None:
            continue
        found.append(
            Divergence(
                **where,
                id=row["id"],
                turn=row["turn"],
                position=position,
                baseline_token=left[position] if position < len(left) else None,
                head_token=right[position] if position < len(right) else None,
                context=(*row["prompt_token_ids"], *left[:position]),
            )
        )
    return compared, prompts_differ, found


def _require_later_turn(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> None:
    if other is not None and row["turn"] == 0:
        found, expected = len(other["prompt_token_ids"]), len(row["prompt_token_ids"])
        raise UserError(
            f"prompt {row['id']} has {found} tokens with the head and {expected} without it, and not "
            "the same ones: the two servers differ in tokenizer, chat template or target.",
            code="endpoints-differ",
            remedy="Give a bench.baseline_endpoint that serves what bench.endpoint serves.",
            facts={"prompt": row["id"], "with_head": found, "without_head": expected},
        )


@dataclass(frozen=True)
class _Context:
    ids: tuple[int, ...]
    lead: int  # the last so many ids are an answer's and can be decoded again

    def at_once(self) -> Probe:
        return Probe(list(self.ids), 1)

    def decoded(self) -> Probe:
        return Probe(list(self.ids[: len(self.ids) - self.lead]), self.lead + 1)


def judge(
    divergences: Sequence[Divergence], undisturbed: Sequence[Mapping[str, Any]], ask: Ask
) -> tuple[list[Divergence], dict[str, Any]]:
    """Each divergence with its verdict, and the noise that it was held to.

    Args:
        undisturbed: rows of the baseline, for contexts beside the divergent ones.
        ask: scores probes on the plain engine.
    """
    divergent = {
        divergence.context: _Context(divergence.context, min(LEAD_TOKENS, divergence.position))
        for divergence in divergences
    }
    scored = ask([context.at_once() for context in divergent.values()], 1)
    best = {ids: scores.logprobs[0] for ids, scores in zip(divergent, scored, strict=True)}
    contexts = list(divergent.values())
    for row in undisturbed[:MORE_CONTEXTS]:
        ids = (*row["prompt_token_ids"], *row["token_ids"][:-1])
        contexts.append(_Context(ids, min(LEAD_TOKENS, max(len(row["token_ids"]) - 1, 0))))
    changes = _noise_changes(contexts, ask)
    noise = max(changes, default=0.0)
    judged = [_verdict(divergence, best[divergence.context], noise) for divergence in divergences]
    return judged, {
        "noise_logits": noise,
        "contexts_scored": len(best),
        "changes_measured": len(changes),
    }


def _noise_changes(contexts: Sequence[_Context], ask: Ask) -> list[float]:
    """The changes of the top-two gaps between four batch shapes, over all contexts."""
    crowd = [*contexts] * math.ceil(MIN_TOGETHER / len(contexts))
    at_once, decoded = [c.at_once() for c in crowd], [c.decoded() for c in crowd]
    shapes = [
        [ask(probes[: len(contexts)], 1), ask(probes, min(len(probes), MAX_IN_FLIGHT))]
        for probes in (at_once, decoded)
    ]
    return [
        change
        for index, context in enumerate(contexts)
        for change in _changes(index, context, shapes)
    ]


def _top_two_gap(best: Logprobs, pair: tuple[int, int]) -> float | None:
    first, second = (best.get(token) for token in pair)
    return None if first is None or second is None else first - second


def _changes(index: int, context: _Context, shapes: list[list[list[Scored]]]) -> list[float]:
    """How much the top-two gap of one context's positions changes with the batch's shape."""
    readings: list[list[Logprobs]] = [[] for _ in range(context.lead + 1)]
    wanted = context.ids[len(context.ids) - context.lead :]
    for scored in (batch[index] for batch in shapes[0]):
        readings[context.lead].append(scored.logprobs[0])
    for scored in (batch[index] for batch in shapes[1]):
        for step, best in enumerate(scored.logprobs):
            if tuple(scored.token_ids[:step]) == wanted[:step]:
                readings[step].append(best)
    changes = []
    for reading in readings:
        if len(reading) < 2:
            continue
        pair = _top_two(reading[0])
        gaps = [gap for best in reading if (gap := _top_two_gap(best, pair)) is not None]
        changes.append(max(gaps) - min(gaps))
    return changes


def _top_two(best: Logprobs) -> tuple[int, int]:
    first, second = sorted(best, key=lambda token: -best[token])[:2]
    return first, second


def _verdict(divergence: Divergence, best: Logprobs, noise: float) -> Divergence:
    pair = {divergence.baseline_token, divergence.head_token}
    found = [logprob for token, logprob in best.items() if token in pair]
    if len(found) < len(pair):
        return replace(divergence, gap=None, verdict="wrong")
    gap, behind = max(found) - min(found), max(best.values()) - min(found)
    is_near = pair == set(_top_two(best)) or behind <= min(noise, MAX_BEHIND)
    return replace(divergence, gap=gap, verdict="tie" if gap <= noise and is_near else "wrong")
