# SPDX-License-Identifier: Apache-2.0
"""What holds the result back, and the next step that would help most: one sentence each.

In: a report with its lineage. Out: {limit, says, next}, or None for a head that this run did not make
or that was never walked. Only measured facts decide, in this order:

    serving   the served gain (AL - 1) is under a quarter of the walked one
    prompts   AL is under 0.95 of the walked AL: bench's prompts are unlike training's
    steps     the walk rose by more than 1 % over the last third of the steps, or there were too few
              steps to tell
    rows      otherwise: what these rows teach is learnt
"""

from collections.abc import Mapping, Sequence
from typing import Any

_SERVED_OTHERWISE = 0.25
_UNLIKE = 0.95
_RISE = 1.01
_FEW_STEPS = 200

Report = Mapping[str, Any]
Walk = Sequence[float]  # (step, walked acceptance length)


def find(report: Report) -> dict[str, str] | None:
    """The limit of this report's head.

    Worked example: walks of 1.31, 1.42 and 1.52 at the steps 100, 200 and 300, and AL 1.51 in vLLM:
    the limit is `steps`, and the next step is twice the epochs.
    """
    lineage = report.get("lineage") or {}
    stages = {entry["stage"]: entry for entry in lineage.get("stages", ())}
    walked = stages.get("train", {}).get("facts", {}).get("walked_acceptance_length")
    if walked is None:
        return None
    known = report["head"]["acceptance"]
    served = known["acceptance_length"]
    highest = (known["acceptance_length_interval"] or [served, served])[1]
    if served - 1 < _SERVED_OTHERWISE * (walked - 1):
        return _limit(
            "serving",
            f"The head walked to {walked:.2f} on held-out training answers and makes {served:.2f} "
            "here: it is served otherwise than it was trained.",
            "Check that bench has training's target, chat template and dtype; then ask "
            "`python -m stages.ops validate`.",
        )
    if highest < _UNLIKE * walked:
        return _limit(
            "prompts",
            f"On answers like those of its training the head makes {walked:.2f}, on these prompts "
            f"{served:.2f}: they are unlike training's.",
            "Add prompts of this kind to synth.prompts, not the measured ones themselves.",
        )
    return _of_training(stages, lineage.get("walks") or [])


def _of_training(stages: Mapping[str, Report], walks: Sequence[Walk]) -> dict[str, str]:
    train = stages["train"]
    steps, rows = train["facts"].get("steps", 0), train["rows"]
    epochs = train["settings"].get("epochs", 1)
    if rise := _rise(walks):
        (before, low), (after, high) = rise
        return _limit(
            "steps",
            f"The walked acceptance length still rose when training ended ({low:.2f} at step "
            f"{before:.0f}, {high:.2f} at step {after:.0f}): training was short.",
            f"Train for more epochs: {2 * epochs} instead of {epochs}{_takes(stages, ('train',), 2)}.",
        )
    if steps < _FEW_STEPS and len(walks) < 3:
        batch = train["settings"].get("batch_tokens")
        smaller = f" of {batch} tokens" if batch else ""
        return _limit(
            "steps",
            f"Training had {steps} steps{smaller}: too few to learn what {rows} rows hold.",
            f"Lower train.batch_tokens, or train for more epochs than {epochs}.",
        )
    best = max(walks, key=lambda walk: walk[1], default=None)
    peak = f" (best {best[1]:.2f} at step {best[0]:.0f} of {steps})" if best else ""
    return _limit(
        "rows",
        f"The walked acceptance length stopped rising{peak}: what {rows} rows teach is learnt.",
        "Give synth more prompts: four times as many rows"
        f"{_takes(stages, ('synth', 'dump', 'train'), 4)}.",
    )


def _rise(walks: Sequence[Walk]) -> tuple[Walk, Walk] | None:
    """(walk at two thirds of the steps, last walk) where the last is the best and clearly higher."""
    if len(walks) < 2:
        return None
    last = walks[-1]
    before = min(walks[:-1], key=lambda walk: abs(walk[0] - last[0] * 2 / 3))
    is_best = last[1] >= max(walk[1] for walk in walks)
    return (before, last) if is_best and last[1] > _RISE * before[1] else None


def _takes(stages: Mapping[str, Report], names: Sequence[str], times: int) -> str:
    """`, about 12 minutes on this machine`, from what these stages took; nothing where that is not known."""
    seconds = [stages[name]["seconds"] for name in names if name in stages]
    if None in seconds or len(seconds) < len(names):
        return ""
    total_s = times * sum(seconds)
    return f", about {max(1, round(total_s / 60))} minutes on this machine"


def _limit(limit: str, says: str, next_step: str) -> dict[str, str]:
    return {"limit": limit, "says": says, "next": next_step}
