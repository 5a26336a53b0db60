# SPDX-License-Identifier: Apache-2.0
"""The settings of an export are those that its checkpoint was trained with.

No tensor shows a window, a norm's place or the dump that was learnt from: with the settings of another
recipe the weights would load, and the head would compute something else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.unfinished import started_identity
from shared.errors import UserError
from stages.train.config import ExportConfig
from stages.train.export import warm_start

# The export's own choice (the draft length on its card), and how the dump was read.
_FREE = ("train.walk_tokens", "train.follow")


def as_trained(config: ExportConfig, checkpoint: Path) -> tuple[ExportConfig, dict[str, Any]]:
    """The config with the training's settings wherever none was given, and the training's identity.

    Args:
        checkpoint: `<training>/checkpoints/<name>.pt`, or a copy of one of this run's.

    Raises:
        UserError: a given setting differs from the training's, or the head that it began with has changed.
    """
    own = config.paths.stage("train")
    training = checkpoint.parent.parent
    trained = started_identity(training) or started_identity(own)
    if trained is None:
        raise UserError(
            f"expected a training in {own}, found none.",
            code="training-missing",
            remedy="Train first, or give the run.name of the training.",
            facts={"folder": str(own)},
        )
    wanted = {
        key: value for key, value in config.with_defaults(trained).items() if _is_setting(key)
    }
    if differing := list(_differing(config, wanted)):
        raise UserError(
            f"{training} was trained with other settings than this export is given: "
            f"{', '.join(differing)}.",
            code="export-settings",
            remedy="Give the recipe of the training, or leave these settings out.",
            facts={"differing": differing},
        )
    run = config.run.model_copy(update=_of_section("run", wanted))
    config = config.model_copy(update={**_of_section("train", wanted), "run": run})
    config = ExportConfig.model_validate(config.model_dump())  # lists of JSON become tuples again
    found = warm_start.fingerprint(config).get("init_from")
    if found != trained.get("input.init_from"):
        raise UserError(
            f"train.init_from: {config.init_from} is not the head any more that this training began with.",
            code="export-init-from-changed",
            remedy="Restore it: the head's settings are read from its config.json.",
            facts={"init_from": config.init_from},
        )
    return config, trained


def _is_setting(key: str) -> bool:
    return key.startswith(("run.", "train.")) and key not in _FREE


def _of_section(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = (key.partition(".") for key in settings)
    return {name: settings[f"{section}.{name}"] for first, _, name in found if first == section}


def _differing(config: ExportConfig, wanted: Mapping[str, Any]) -> Iterator[str]:
    """Each setting that was given, and is not the training's; `auto` agrees with what it came to."""
    given = {f"train.{name}" for name in config.model_fields_set}
    given |= {f"run.{name}" for name in config.run.model_fields_set}
    own = config.identity()
    for key in sorted(own.keys() & given & wanted.keys()):
        if own[key] not in (wanted[key], "auto"):
            yield f"{key} {own[key]!r} instead of {wanted[key]!r}"
