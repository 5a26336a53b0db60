# SPDX-License-Identifier: Apache-2.0
"""What holds the result back, and the next step that would help most: one sentence each.

In: a report with its lineage. Out: {limit, says, next}, or None for a head that this run did not make
or that was never walked. Only measured facts decide, in this order:

    serving   the served gain (AL - 1) is under a quarter of the walked one
    prompts   AL is under 0.95 of the walked AL: bench's prompts are unlike training's
    steps     the walk rose by more than 1 % over the last third of the steps, or there were too few
              steps to tell
    walks     there were too few walks to tell
    rows      otherwise: what these rows teach is learnt

The first two are asked only where the walk and the answers in vLLM can be compared (`walked.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.runtime.wording import counted
from stages.bench.report.walked import Lengths, comparable

_SERVED_OTHERWISE = 0.25
_UNLIKE = 0.95
_RISE = 1.01
_FEW_STEPS = 200
_FEW_WALKS = 3
_WALKS_TO_TELL = 5

Report = Mapping[str, Any]
Walk = Sequence[float]  # (step, walked acceptance length)


def find(report: Report, *, is_exact: bool = True) -> dict[str, str] | None:
    """The limit of this report's head.

    Worked example: walks of 1.31, 1.42 and 1.52 at the steps 100, 200 and 300, and AL 1.51 in vLLM:
    the limit is `steps`, and the next step is twice the epochs.

    Args:
        is_exact: whether the verifier keeps the target's distribution.
    """
    lineage = report.get("lineage") or {}
    stages = {entry["stage"]: entry for entry in lineage.get("stages", ())}
    if stages.get("train", {}).get("facts", {}).get("walked_acceptance_length") is None:
        return None
    shares = lineage.get("walked_per_position")
    lengths = comparable(report, stages["train"], shares) if is_exact else None
    found = _of_serving(lengths) if lengths else None
    return found or _of_training(stages, lineage.get("walks") or [])


def _of_serving(lengths: Lengths) -> dict[str, str] | None:
    """What the answers in vLLM say against those of the training."""
    walked, served, highest, over = lengths
    if served - 1 < _SERVED_OTHERWISE * (walked - 1):
        return _limit(
            "serving",
            f"The head walked to {walked:.2f} on held-out training answers and makes {served:.2f} "
            f"here{over}: it is served otherwise than it was trained.",
            "Check that bench has training's target, chat template and dtype; then ask "
            "`python -m stages.ops validate`.",
        )
    if highest < _UNLIKE * walked:
        return _limit(
            "prompts",
            f"On answers like those of its training the head makes {walked:.2f}, on these prompts "
            f"{served:.2f}{over}: they are unlike training's.",
            "Add prompts of this kind to synth.prompts, not the measured ones themselves.",
        )
    return None


def _of_training(stages: Mapping[str, Report], walks: Sequence[Walk]) -> dict[str, str]:
    train = stages["train"]
    steps, rows = train["facts"].get("steps", 0), train["rows"]
    epochs, max_steps = train["settings"].get("epochs", 1), train["settings"].get("max_steps")
    is_limited = max_steps is not None and steps >= max_steps
    if rise := _rise(walks):
        (before, low), (after, high) = rise
        longer = f"Train for more epochs: {2 * epochs} instead of {epochs}"
        if is_limited:
            longer = f"Raise train.max_steps: {2 * max_steps} instead of {max_steps}"
        return _limit(
            "steps",
            f"The walked acceptance length still rose when training ended ({low:.2f} at step "
            f"{before:.0f}, {high:.2f} at step {after:.0f}): training was short.",
            f"{longer}{_takes(stages, ('train',), 2)}.",
        )
    if steps < _FEW_STEPS and len(walks) < _FEW_WALKS:
        batch = train["settings"].get("batch_tokens")
        smaller = f" of {batch} tokens" if batch else ""
        return _limit(
            "steps",
            f"Training had {steps} steps{smaller}: too few to learn what {rows} rows hold.",
            f"Raise train.max_steps: it is {max_steps}."
            if is_limited
            else f"Lower train.batch_tokens, or train for more epochs than {epochs}.",
        )
    if len(walks) < _FEW_WALKS:
        every = train["settings"].get("eval_every_steps")
        now = f" (it is {every})" if every else ""
        return _limit(
            "walks",
            f"Training's {steps} steps have {counted(len(walks), 'walk')}: too few to tell whether more "
            "steps or more rows would help.",
            f"Train with train.eval_every_steps: {max(1, steps // _WALKS_TO_TELL)}{now}.",
        )
    best = max(walks, key=lambda walk: walk[1])
    return _limit(
        "rows",
        f"The walked acceptance length stopped rising (best {best[1]:.2f} at step {best[0]:.0f} of "
        f"{steps}): what {rows} rows teach is learnt.",
        "Give synth more prompts: four times as many rows"
        f"{_takes(stages, ('synth', 'dump', 'train'), 4)}.",
    )


def _rise(walks: Sequence[Walk]) -> tuple[Walk, Walk] | None:
    """(walk at two thirds of the steps, last walk) where the last is the best and clearly higher.

    None also where the walk before it was in the first half: it tells nothing of the end.
    """
    if len(walks) < 2:
        return None
    last = walks[-1]
    before = min(walks[:-1], key=lambda walk: abs(walk[0] - last[0] * 2 / 3))
    is_best = last[1] >= max(walk[1] for walk in walks)
    is_late = before[0] >= last[0] / 2
    return (before, last) if is_best and is_late and last[1] > _RISE * before[1] else None


def _takes(stages: Mapping[str, Report], names: Sequence[str], times: int) -> str:
    """`, about 12 minutes on this machine`, from what these stages took; nothing where that is not known."""
    seconds = [stages[name]["seconds"] for name in names if name in stages]
    if None in seconds or len(seconds) < len(names):
        return ""
    total_s = times * sum(seconds)
    return f", about {counted(max(1, round(total_s / 60)), 'minute')} on this machine"


def _limit(limit: str, says: str, next_step: str) -> dict[str, str]:
    return {"limit": limit, "says": says, "next": next_step}
