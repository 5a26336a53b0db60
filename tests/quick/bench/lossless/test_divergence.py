# SPDX-License-Identifier: Apache-2.0
"""Divergences and their verdicts, with an engine whose logprobs are set by hand."""

from typing import Any

import pytest

from shared.errors import UserError
from stages.bench.lossless import judge as lossless
from stages.bench.lossless.divergence import Probe, Scored, compare, judge
from tests.measurements import engine, request, under_load

BASELINE, HEAD = [5, 6, 7], [5, 9, 7]


def row(name: str, token_ids: list[int], **more: Any) -> dict[str, Any]:
    made = request(name, "x", None, tokens=0, latency_s=1.0)
    return {**made, "token_ids": token_ids, **more}


class Target:
    """Always answers 6 before 9 by `gap`; a decode in company shifts the gap by `noise`.

    Where `ahead` is given, 8 is before both by as much, and the shift is its own too.
    """

    def __init__(
        self, *, gap: float = 0.02, noise: float = 0.05, ahead: float | None = None
    ) -> None:
        self.gap, self.noise, self.ahead = gap, noise, ahead
        self.asked: list[tuple[int, int]] = []

    def __call__(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        self.asked.append((len(probes), concurrency))
        shift = self.noise if concurrency > 1 else 0.0
        best = {6: -0.70, 9: -0.70 - self.gap - shift, 7: -3.0, 1: -4.0}
        best |= {2: -5.0} if self.ahead is None else {8: -0.70 + self.ahead + shift}
        return [
            Scored([BASELINE[0]] * probe.num_tokens, [best] * probe.num_tokens) for probe in probes
        ]


def verdict(head: list[int], **target: float) -> tuple[str, float | None]:
    where = {"engine": "head", "concurrency": 1, "max_tokens": 3}
    _, _, found = compare([row("a", BASELINE)], [row("a", head)], **where)
    ((divergence,), _) = judge(
        found, [row(f"other-{n}", BASELINE) for n in range(3)], Target(**target)
    )
    return divergence.verdict, divergence.gap


def test_the_docstring_example() -> None:
    assert verdict(HEAD, gap=0.02, noise=0.05) == ("tie", pytest.approx(0.02))
    assert verdict(HEAD, gap=0.02, noise=0.01)[0] == "wrong"


def test_three_tokens_may_share_the_top() -> None:
    assert verdict(HEAD, gap=0.02, noise=0.05, ahead=0.01) == ("tie", pytest.approx(0.02))
    assert verdict(HEAD, gap=0.0, noise=0.05, ahead=0.06)[0] == "wrong"
    assert verdict(HEAD, gap=0.0, noise=50.0, ahead=1.01)[0] == "wrong"


def test_a_token_that_is_not_among_the_top_two_is_wrong_however_noisy() -> None:
    # 7 is third, 2.3 logits behind; 400 is not among the best at all.
    assert verdict([5, 7, 7], noise=50.0) == ("wrong", pytest.approx(2.3))
    assert verdict([5, 400, 7], noise=50.0) == ("wrong", None)


def test_an_answer_that_ends_early_is_wrong() -> None:
    assert verdict([5], noise=50.0) == ("wrong", None)


def test_a_divergence_says_where() -> None:
    where = {"engine": "head-k5", "concurrency": 8, "max_tokens": 3}
    compared, apart, (found,) = compare([row("a", BASELINE)], [row("a", HEAD)], **where)
    assert (compared, apart) == (1, 0)
    assert (found.id, found.turn, found.position) == ("a", 0, 1)
    assert (found.baseline_token, found.head_token) == (6, 9)
    assert found.context == (1, 2, 3, 5)  # the prompt, and the answer so far
    assert (found.engine, found.concurrency) == ("head-k5", 8)


def test_a_later_turn_with_another_prompt_is_not_compared() -> None:
    where = {"engine": "head", "concurrency": 1, "max_tokens": 3}
    plain = [row("a", BASELINE), row("a", [8], turn=1, prompt_token_ids=[1, 5, 6, 7])]
    drafted = [row("a", HEAD), row("a", [4], turn=1, prompt_token_ids=[1, 5, 9, 7])]
    compared, apart, found = compare(plain, drafted, **where)
    assert (compared, apart, len(found)) == (1, 1, 1)


def test_a_first_turn_with_another_prompt_is_another_target() -> None:
    """No answer before it can have made it differ."""
    where = {"engine": "head", "concurrency": 1, "max_tokens": 3}
    other = row("a", BASELINE, prompt_token_ids=[1, 2])
    told = "prompt a has 2 tokens with the head and 3 without it, .* bench.baseline_endpoint"
    with pytest.raises(UserError, match=told):
        compare([row("a", BASELINE)], [other], **where)


def test_the_noise_is_measured_alone_and_together_in_four_shapes() -> None:
    where = {"engine": "head", "concurrency": 1, "max_tokens": 3}
    _, _, found = compare([row("a", BASELINE)], [row("a", HEAD)], **where)
    target = Target(noise=0.25)
    _, noise = judge(found, [row(f"other-{n}", BASELINE) for n in range(30)], target)
    assert target.asked == [(1, 1), (17, 1), (17, 17), (17, 1), (17, 17)]  # it and 16 others
    assert noise["noise_logits"] == pytest.approx(0.25)
    assert noise["contexts_scored"] == 1


def test_identical_answers_cost_no_request() -> None:
    def never(probes: list[Probe], concurrency: int) -> list[Scored]:
        raise AssertionError("nothing to ask")

    plain = engine(under_load([row("a", BASELINE)], wall_s=1.0))
    found = lossless.judged(plain, {"head": plain}, never)
    assert found is not None
    assert (found["compared"], found["identical"], found["wrong"]) == (1, 1, 0)


def test_only_greedy_loads_are_compared() -> None:
    warm = engine(under_load([row("a", BASELINE)], wall_s=1.0, temperature=0.7))
    other = engine(under_load([row("a", HEAD)], wall_s=1.0, temperature=0.7))
    assert lossless.judged(warm, {"head": other}, Target()) is None


def test_counts_add_up_over_heads() -> None:
    plain = engine(under_load([row("a", BASELINE), row("b", BASELINE)], wall_s=1.0))
    one = engine(under_load([row("a", HEAD), row("b", BASELINE)], wall_s=1.0))
    two = engine(under_load([row("a", BASELINE), row("b", [5, 400, 7])], wall_s=1.0))
    found = lossless.judged(plain, {"head": one, "head-k5": two}, Target(noise=0.5))
    assert found is not None
    counts = {name: found[name] for name in ("compared", "identical", "ties", "wrong")}
    assert counts == {"compared": 4, "identical": 2, "ties": 1, "wrong": 1}
    assert [(d["engine"], d["id"], d["verdict"]) for d in found["divergences"]] == [
        ("head", "a", "tie"),
        ("head-k5", "b", "wrong"),
    ]


def test_every_divergence_is_judged_and_a_sweep_shares_its_contexts() -> None:
    rows = [row(f"{n}", BASELINE, prompt_token_ids=[4, n]) for n in range(300)]
    drafted = [row(f"{n}", HEAD, prompt_token_ids=[4, n]) for n in range(300)]
    plain, head = engine(under_load(rows, wall_s=1.0)), engine(under_load(drafted, wall_s=1.0))
    target = Target(noise=0.5)
    found = lossless.judged(plain, {"head": head, "head-k5": head}, target)
    assert found is not None
    assert (found["ties"], found["wrong"], found["contexts_scored"]) == (600, 0, 300)
    # Each context once, though two heads diverge there; the noise on all of them.
    assert target.asked == [(300, 1), (300, 1), (300, 256), (300, 1), (300, 256)]
