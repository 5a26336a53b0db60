# SPDX-License-Identifier: Apache-2.0
"""dump and train at the same time (`train.follow`): which stages run together, on what of a machine.

On GPUs dump gets the first ones, as many as its engines need, and train the others. Without a GPU
each gets half of the cores; on one core both share it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.recipe import read_recipe
from shared.runtime.gpus import listed_devices
from stages.ops.chain.kubernetes import objects
from stages.ops.chain.kubernetes.kubectl import Overlay
from stages.ops.chain.machine import Machine, look
from stages.ops.chain.processes import Step
from stages.ops.chain.served import problem
from stages.ops.config import RunChainConfig

PAIR = ("dump", "train")


def groups(stages: Sequence[str], recipe: Path) -> list[tuple[str, ...]]:
    """The stages in order, those together that run at the same time."""
    is_followed = bool(read_recipe(recipe).get("train", {}).get("follow"))
    if not (is_followed and set(PAIR) <= set(stages)):
        return [(stage,) for stage in stages]
    return [PAIR if stage == "dump" else (stage,) for stage in stages if stage != "train"]


def refuse_on_kubernetes(config: RunChainConfig, overlay: Overlay) -> None:
    """`ops run --by kubernetes` follows one Job at a time.

    Raises:
        UserError: two are to run at the same time, by the recipe or by the arguments of dump's Job.
    """
    if not set(PAIR) <= set(config.stages):
        return
    arguments = objects.arguments(overlay.job("dump"))
    has_window = any(each.replace("-", "_").startswith("__window_shards") for each in arguments)
    if has_window or PAIR in groups(config.stages, config.recipe):
        raise UserError(
            "--by kubernetes follows one Job at a time, and with a window of shards dump and train run "
            "at the same time.",
            code="follow-by-kubernetes",
            remedy=f"Run synth with --only synth, apply both (kubectl apply -k {config.overlay} -l "
            "'app.kubernetes.io/component in (recipe, dump, train)'), then run bench with --only bench.",
        )


def gpus_of_dump(settings: Mapping[str, Any]) -> int:
    """GPUs that dump's engines need."""
    return int(settings.get("tensor_parallel_size", 1)) * int(settings.get("data_parallel", 1))


def share(stage: str, config: RunChainConfig) -> dict[str, Any]:
    """What one of the two gets of this machine, as `processes.run_stage` takes it."""
    total = len(look().gpus)
    if not total:
        return {"cores": cores(stage, sorted(os.sched_getaffinity(0)))}
    count = gpus_of_dump(read_recipe(config.recipe).get("dump", {}))
    if total <= count:  # preflight has refused it
        return {}
    names = listed_devices() or list(map(str, range(total)))
    return {"gpus": ",".join(names[:count] if stage == "dump" else names[count:total])}


def cores(stage: str, own: Sequence[int]) -> Sequence[int]:
    """The cores of one of the two; on one core both share it.

    Worked example: of the cores 0, 1 and 2 dump gets 0, train 1 and 2.
    """
    if len(own) < 2:
        return own
    half = len(own) // 2
    return own[:half] if stage == "dump" else own[half:]


def problems(steps: Sequence[Step], machine: Machine, *, is_local: bool) -> Iterator[str]:
    """What of a window's settings cannot work together."""
    by_stage = {step.stage: step for step in steps}
    dump, train = (by_stage.get(stage) for stage in PAIR)
    has_window = bool(dump and dump.settings["window_shards"])
    follows = bool(train and train.settings["follow"])
    if dump and has_window and not dump.done and not follows:
        yield problem(
            "dump.window_shards",
            "train beside dump, with train.follow: true",
            "train.follow: false" if train else "no stage train in this command",
            "Set it, and run dump and train in one command; or leave window_shards out.",
        )
    if train and follows and not train.done and dump and not has_window:
        yield problem(
            "train.follow", "dump.window_shards", "none", "Set it, or leave train.follow out."
        )
    if not (dump and train and has_window and follows) or train.done:
        return
    needed = gpus_of_dump(dump.settings) + 1
    if is_local and machine.gpus and len(machine.gpus) < needed and not dump.done:
        yield problem(
            "train.follow",
            f"{needed} GPUs, since dump and train run at the same time",
            str(len(machine.gpus)),
            "Leave window_shards and follow out, or use a machine with more GPUs.",
        )
