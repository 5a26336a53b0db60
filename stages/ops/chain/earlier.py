# SPDX-License-Identifier: Apache-2.0
"""How long a stage took in another run of this target: nothing else here knows how fast a machine is."""

import dataclasses

from shared.artifacts.manifest import MANIFEST
from shared.artifacts.run_state import RunState
from shared.errors import EyrieError
from shared.paths import RunPaths
from stages.ops.chain.processes import Step

# Settings that decide how long a stage takes for a row or a step.
_OF_SPEED = (
    "backend",
    "mode",
    "dtype",
    "mixed_precision",
    "optimizer",
    "batch_tokens",
    "max_tokens",
    "num_speculative_tokens",
    "engine_args",
    "server_args",
    "speculative_args",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel",
)


# A training writes down the batch that it chose, and not that this was left to it.
_CHOSEN = ("batch_tokens", "auto")


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The same stage in another run of this target.

    Attributes:
        seconds: from what the stage wrote first, its status, to what it wrote last, its manifest.
        passes: rows, times train's epochs.
        steps: of train; 0 of another stage.
        differing: the settings that decide its speed and are other ones now.
    """

    run: str
    finished: str
    seconds: float
    passes: int
    steps: int
    differing: tuple[str, ...]


def earlier(paths: RunPaths, step: Step) -> Earlier | None:
    """The newest one with settings like these, else the newest; None where there is none."""
    found = [
        each
        for path in paths.workspace.glob(f"*/{step.stage}/{MANIFEST}")
        if path.parents[1].name != paths.run_name
        and (each := _earlier(RunPaths(paths.workspace, path.parents[1].name), step))
    ]
    return max(found, key=lambda each: (not each.differing, each.finished), default=None)


def _earlier(other: RunPaths, step: Step) -> Earlier | None:
    run = RunState(other)
    try:
        manifest, seconds = run.manifest(step.stage), run.seconds(step.stage)
    except EyrieError:
        return None
    if manifest is None or manifest["identity"].get("run.target") != step.run["target"]:
        return None
    config, facts = manifest["config"], manifest["facts"]
    # One that `max_steps` ended says how long its steps take, and not how long all rows would.
    names = (*_OF_SPEED, "max_steps") if config.get("max_steps") else _OF_SPEED
    differing = tuple(
        name
        for name in names
        if name in config
        and (asked := step.settings.get(name, config[name])) != config[name]
        and (name, asked) != _CHOSEN
    )
    passes = int(manifest["counts"]["ok"]) * int(config.get("epochs", 1))
    if not seconds or not passes:
        return None
    finished = str(manifest["provenance"]["finished"])
    steps = int(facts.get("steps", 0))
    return Earlier(other.run_name, finished, seconds, passes, steps, differing)
