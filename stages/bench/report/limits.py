# SPDX-License-Identifier: Apache-2.0
"""What holds the result back, and the next step that would help most: one sentence each.

In: a report with its lineage. Out: {limit, says, next}, or None for a head that this run did not make
or that was never walked. Only measured facts decide, in this order:

    serving   AL is under 0.95 of the walked AL, on prompts of training's own source that the target
              answered itself: it is served otherwise than it was trained
    unlike    AL is under 0.95 of the walked AL: that, or bench's prompts are unlike training's
    steps     the walk rose by more than 1 % over the last third of the steps, or there were too few
              steps to tell
    walks     there were too few walks to tell
    rows      otherwise: what these rows teach is learnt

Those two are asked only where the walk and the answers in vLLM can be compared (`walked.py`).
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shared.runtime.wording import counted
from stages.bench.report.walked import Lengths, comparable

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
    found = _of_serving(report, stages, lengths) if lengths else None
    return found or _of_training(stages, lineage.get("walks") or [])


def _of_serving(
    report: Report, stages: Mapping[str, Report], lengths: Lengths
) -> dict[str, str] | None:
    """What the answers in vLLM say against those of the training."""
    walked, served, highest, over = lengths
    if highest >= _UNLIKE * walked:
        return None
    says = (
        f"The head walked to {walked:.2f} on held-out answers of its training and makes {served:.2f} here"
        f"{over}"
    )
    check = (
        "check that bench has training's target, chat template and dtype, and ask "
        f"`python -m stages.ops validate {report['run']}`."
    )
    synth = stages.get("synth", {}).get("settings", {})
    is_own = synth.get("mode", "keep") != "keep"
    if is_own and _is_of_training(report, stages.values()):
        return _limit(
            "serving",
            f"{says}, on prompts of its training's source: it is served otherwise than it was trained.",
            f"{check[0].upper()}{check[1:]}",
        )
    own = "" if is_own else ", or the target's own answers are unlike those that it was trained on"
    return _limit(
        "unlike",
        f"{says}: either these prompts are unlike training's{own}, or it is served otherwise than it was "
        "trained.",
        "Tell them apart: measure it on training's own prompts "
        f"(`python -m stages.bench --recipe RECIPE --name {report['run']}-own --head {report['run']}/export "
        f"--prompts {_prompts(synth)} --max_prompts 40`). Near {walked:.2f} there: add prompts of the kind "
        "measured here to synth.prompts, not the measured ones themselves. As low as here: "
        f"{'' if is_own else 'train on answers of the target (synth.mode: regenerate), or '}{check}",
    )


def _is_of_training(report: Report, stages: Iterable[Report]) -> bool:
    """Whether bench's prompts are a training input, or another split of the same data set on the hub.

    A digest is a file's hash, or `data set@revision/subset/split`.
    """
    inputs = {name for entry in stages for name in entry.get("inputs", {}).values() if name}
    ours = report["measured"]["prompts"].rpartition("/")[0] or report["measured"]["prompts"]
    return any(ours in (name, name.rpartition("/")[0]) for name in map(str, inputs))


def _prompts(synth: Report) -> str:
    """What synth read, as a flag takes it; in words where that is not one path."""
    prompts = synth.get("prompts")
    return shlex.quote(prompts) if isinstance(prompts, str) else "TRAINING_PROMPTS"


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
