# SPDX-License-Identifier: Apache-2.0
"""What holds a result back, told from the facts of runs as they happen."""

from typing import Any

import pytest

from stages.bench.report.limits import find


def measured(
    served: float,
    walks: list[tuple[int, float]],
    *,
    rows: int = 480,
    steps: int = 467,
    interval: tuple[float, float] | None = None,
    seconds: float | None = 600.0,
    drafted: int = 3,
    temperature: float = 0.0,
    per_position: tuple[float, ...] = (),
    shares: tuple[float, ...] | None = None,
    max_steps: int | None = None,
    mode: str = "regenerate",
    prompts: str = "held-out",
) -> dict[str, Any]:
    """A report of which only the facts that decide are there."""
    best = max(walks, key=lambda walk: walk[1]) if walks else (steps, None)
    entry = {"rows": rows, "seconds": seconds, "settings": {}, "facts": {}}
    train: dict[str, Any] = {
        "stage": "train",
        "facts": {"steps": steps, "best_step": best[0], "walked_acceptance_length": best[1]},
        "settings": {"epochs": 5, "batch_tokens": 2048, "eval_every_steps": 100, "walk_tokens": 3},
    }
    acceptance = {
        "acceptance_length": served,
        "acceptance_length_interval": interval,
        "per_position": per_position,
    }
    train["settings"] |= {"max_steps": max_steps}
    synth = {
        "stage": "synth",
        "settings": {"mode": mode, "prompts": "my prompts.jsonl"},
        "inputs": {"prompts.jsonl": "learnt", "hub": "org/chats@latest//train", "template": None},
    }
    stages = [{**entry, **synth}, {**entry, "stage": "dump"}, {**entry, **train}]
    return {
        "run": "demo",
        "measured": {"prompts": prompts},
        "num_speculative_tokens": drafted,
        "temperature": temperature,
        "head": {"acceptance": acceptance},
        "lineage": {
            "stages": stages,
            "walks": [list(walk) for walk in walks],
            "walked_per_position": shares,
        },
    }


RISING = [(100, 1.35), (200, 1.46), (300, 1.54), (400, 1.59), (467, 1.61)]  # SmolLM2, five epochs
FLAT = [(100, 2.98), (200, 3.36), (255, 3.39)]  # the demo's target
OVERFIT = [(100, 1.52), (200, 1.66), (300, 1.63), (400, 1.60)]


@pytest.mark.parametrize(
    ("report", "limit", "told"),
    [
        (measured(1.58, RISING), "steps", "10 instead of 5, about 20 minutes"),
        (measured(3.33, FLAT, rows=1140, steps=255), "rows", "about 120 minutes"),
        (measured(1.64, OVERFIT, steps=400), "rows", "four times as many rows"),
        (measured(1.39, [(92, 1.40)], steps=92), "steps", "train.batch_tokens"),
        (measured(1.45, [(300, 1.5)], steps=300), "walks", "eval_every_steps: 60 (it is 100)"),
        # What rose between a third of the steps and the end may have stopped since.
        (measured(1.45, [(100, 1.3), (300, 1.5)], steps=300), "walks", "eval_every_steps: 60"),
        # One epoch of broad text walked to 1.39; Spec-Bench's prompts gave 1.22.
        (measured(1.22, [(92, 1.39)], steps=92, interval=(1.18, 1.26)), "unlike", "synth.prompts"),
        (measured(1.02, FLAT, steps=255), "unlike", "chat template"),
    ],
)
def test_the_limit_of_a_run(report: dict[str, Any], limit: str, told: str) -> None:
    found = find(report)
    assert found is not None
    assert (found["limit"], told in found["next"]) == (limit, True), found


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (
            measured(1.58, RISING, max_steps=467),
            "Raise train.max_steps: 934 instead of 467, about 20",
        ),
        (measured(1.39, [(92, 1.40)], steps=92, max_steps=92), "Raise train.max_steps: it is 92."),
        (measured(1.58, RISING, max_steps=500), "Train for more epochs: 10 instead of 5"),
    ],
)
def test_steps_that_a_limit_ended_come_from_a_higher_limit(
    report: dict[str, Any], told: str
) -> None:
    found = find(report)
    assert found is not None and found["limit"] == "steps"
    assert found["next"].startswith(told), found


def test_one_of_a_thing_has_no_s() -> None:
    short = find(measured(1.58, RISING, seconds=20.0))
    assert short is not None and short["next"].endswith("about 1 minute on this machine.")
    once = find(measured(1.45, [(300, 1.5)], steps=300))
    assert once is not None and "have 1 walk:" in once["says"]


def test_a_difference_within_the_interval_says_nothing_about_prompts() -> None:
    found = find(measured(1.50, OVERFIT, interval=(1.40, 1.60)))
    assert found is not None and found["limit"] == "rows"


WALKED = (0.8, 0.6, 0.4)  # a walk of 2.80 with K = 3
LONG = [(100, 2.7), (200, 2.8), (300, 2.79)]


@pytest.mark.parametrize(
    ("served", "drafted", "per_position", "limit"),
    [
        (1.79, 1, (0.79,), "rows"),
        (1.40, 1, (0.40,), "unlike"),
        (1.10, 1, (0.10,), "unlike"),
        (2.35, 2, (0.79, 0.56), "rows"),
        (2.90, 5, (0.7, 0.5, 0.3, 0.2, 0.2), "unlike"),  # 2.50 of the walk's three
        (3.00, 5, (0.79, 0.6, 0.39, 0.12, 0.1), "rows"),
    ],
)
def test_drafts_of_another_length_are_compared_over_the_positions_of_both(
    served: float, drafted: int, per_position: tuple[float, ...], limit: str
) -> None:
    more: Any = {"drafted": drafted, "per_position": per_position, "steps": 300}
    found = find(measured(served, LONG, shares=WALKED, **more))
    assert found is not None and found["limit"] == limit, found
    both = "3 tokens" if drafted > 3 else "token"
    assert limit == "rows" or f"(counting the first {both} of a draft)" in found["says"]
    if drafted < 3:  # the walk of that length is not known
        assert (find(measured(served, LONG, **more)) or {})["limit"] == "rows"


@pytest.mark.parametrize("served", [1.02, 1.40, 1.46, 2.50])
def test_what_is_accepted_less_has_two_causes_and_a_step_that_tells_them_apart(
    served: float,
) -> None:
    found = find(measured(served, LONG, steps=300))
    assert found is not None and found["limit"] == "unlike"
    assert found["says"] == (
        f"The head walked to 2.80 on held-out answers of its training and makes {served:.2f} here: either "
        "these prompts are unlike training's, or it is served otherwise than it was trained."
    )
    assert (
        "`python -m stages.bench --recipe RECIPE --name demo-own --head demo/export --prompts "
        "'my prompts.jsonl' --max_prompts 40`"
    ) in found["next"]


@pytest.mark.parametrize(
    ("prompts", "mode", "limit"),
    [
        ("learnt", "regenerate", "serving"),
        ("org/chats@latest//test", "regenerate", "serving"),  # another split of the same data set
        ("org/chats@latest/other/test", "regenerate", "unlike"),
        ("org/others@latest//train", "regenerate", "unlike"),
        ("learnt", "keep", "unlike"),
    ],
)
def test_the_serving_alone_is_named_only_on_prompts_of_the_trainings_source(
    prompts: str, mode: str, limit: str
) -> None:
    found = find(measured(1.4, LONG, steps=300, prompts=prompts, mode=mode))
    assert found is not None and found["limit"] == limit
    other_answers = "the target's own answers are unlike those that it was trained on"
    assert (other_answers in found["says"]) is (mode == "keep")


def test_sampled_answers_and_lossy_ones_are_not_compared_with_the_greedy_walk() -> None:
    sampled = find(measured(2.2, LONG, temperature=1.0, steps=300))
    assert sampled is not None and sampled["limit"] == "rows"
    lossy = find(measured(1.1, LONG, steps=300), is_exact=False)
    assert lossy is not None and lossy["limit"] == "rows"


def test_times_that_are_not_known_are_not_told() -> None:
    found = find(measured(1.58, RISING, seconds=None))
    assert found is not None and found["next"].endswith("10 instead of 5.")


def test_a_head_from_elsewhere_or_one_that_was_never_walked_has_no_limit() -> None:
    assert find({"head": {"acceptance": {}}}) is None
    assert find(measured(1.5, [])) is None
